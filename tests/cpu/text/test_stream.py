"""Streamed text = whole text at every split, and stop strings as a search of the whole text finds them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firebox.errors import RequestError
from firebox.text.stream import StopSearch, TextStream, require_stops

LETTERS = st.text(st.sampled_from("ab"), max_size=40)
STOPS = st.lists(st.text(st.sampled_from("ab"), min_size=1, max_size=6), min_size=1, max_size=4)


def pieces(sequence, cuts):
    """The sequence cut at these positions."""
    edges = [0, *sorted({min(cut, len(sequence)) for cut in cuts}), len(sequence)]
    return [sequence[a:b] for a, b in itertools.pairwise(edges)]


def first_stop(text, stops):
    """(end, stop) of the match that ends first, the longest of those that end together; by brute force."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


@given(data=st.data(), cuts=st.lists(st.integers(0, 30)))
def test_any_ids_at_any_split_give_the_whole_text(tokenizer, data, cuts):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    for skip in (True, False):
        stream = TextStream(tokenizer, skip_special_tokens=skip)
        streamed = "".join(stream.feed(part) for part in pieces(ids, cuts)) + stream.finish()
        assert streamed == tokenizer.decode(ids, skip_special_tokens=skip)
        assert stream.used_ids == len(ids)


@given(text=st.text(st.sampled_from("a🔥日é😀"), max_size=8))
def test_half_a_character_is_never_shown(tokenizer, text):
    stream = TextStream(tokenizer)
    shown = ""
    for token_id in tokenizer.encode(text):
        shown += stream.feed([token_id])
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""


def test_an_unfinished_character_is_shown_at_the_end(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("ok🔥")[:-1]
    assert "".join(stream.feed([id]) for id in ids) == "ok"
    assert stream.finish() == "�"


@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 40)), include=st.booleans())
def test_stop_search_equals_brute_force_at_every_split(text, stops, cuts, include):
    search = StopSearch(stops, include=include)
    shown = ""
    for part in pieces(text, cuts):
        shown += search.feed(part)
        if search.matched is not None:
            break
    found = first_stop(text, stops)
    if found is None:
        assert search.matched is None
        assert shown + search.finish() == text
    else:
        end, stop = found
        assert search.matched == stop
        assert shown == text[: end if include else end - len(stop)]
        assert search.finish() == ""


@given(text=LETTERS, stops=STOPS)
def test_only_what_can_begin_a_stop_string_is_held_back(text, stops):
    search = StopSearch(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += search.feed(character)
        if search.matched is not None:
            return
        beginnings = [stop[:length] for stop in stops for length in range(1, len(stop))]
        held = max((len(b) for b in beginnings if text[:end].endswith(b)), default=0)
        assert len(shown) == end - held


@given(text=st.text(st.sampled_from("ab 🔥é"), max_size=20), data=st.data(), include=st.booleans())
def test_stop_string_across_tokens(tokenizer, text, data, include):
    """Every split of the ids finds the same end, and counts the ids up to the one that completed it."""
    stop = data.draw(st.text(st.sampled_from("ab 🔥é"), min_size=1, max_size=4))
    ids = tokenizer.encode(text)
    found = first_stop(text, [stop])
    for cut in range(len(ids) + 1):
        stream = TextStream(tokenizer, stops=[stop], include_stop=include)
        shown = stream.feed(ids[:cut]) + stream.feed(ids[cut:])
        if found is None:
            assert stream.matched is None
            assert shown + stream.finish() == text
            assert stream.used_ids == len(ids)
        else:
            assert stream.matched == stop
            assert shown + stream.finish() == text[: found[0] if include else found[0] - len(stop)]
            assert stop in tokenizer.decode(ids[: stream.used_ids])
            assert stop not in tokenizer.decode(ids[: stream.used_ids - 1])


def test_search_begins_after_min_tokens(tokenizer):
    [word] = tokenizer.encode(" self")
    stream = TextStream(tokenizer, stops=["self"], search_after_ids=2)
    assert "".join(stream.feed([id]) for id in [word] * 4) == " self self "
    assert (stream.matched, stream.used_ids) == ("self", 3)


def test_stop_string_completed_by_the_flush(tokenizer):
    """The last, unfinished character becomes U+FFFD, and that may complete a stop string."""
    stream = TextStream(tokenizer, stops=["k�"])
    shown = stream.feed(tokenizer.encode("ok🔥")[:-1])
    assert shown + stream.finish() == "o"
    assert stream.matched == "k�"


def test_state_does_not_grow_with_the_text():
    """The cost of a step is bounded by what is held, and that by the longest stop string."""
    search = StopSearch(["a" * 50 + "b"])
    for _ in range(2000):
        search.feed("a")
        assert len(search._held) <= 50
    assert search.matched is None


@pytest.mark.parametrize("stop", ["", "x" * 4097])
def test_stop_strings_out_of_range(stop):
    require_stops(["x" * 4096])
    with pytest.raises(RequestError) as caught:
        require_stops(["fine", stop])
    assert caught.value.param == "stop"
