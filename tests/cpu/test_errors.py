"""errors.py: the tree in the docstring is the classes, sentence for sentence."""

from __future__ import annotations

import inspect
import re

import pytest

from firebox import errors

BRANCH = re.compile(r"^(?P<indent>[│ ]*)(?:[├└]─ )?(?P<name>[A-Z]\w+)  +(?P<sentence>.+)$")


def drawn_tree() -> dict[str, tuple[str | None, str]]:
    """Class → (parent, sentence) as the docstring draws it; the depth is where the name starts."""
    tree: dict[str, tuple[str | None, str]] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = BRANCH.match(line)
        if match is None:
            continue
        column, name = match.start("name"), match["name"]
        path = [(at, ancestor) for at, ancestor in path if at < column]
        tree[name] = (path[-1][1] if path else None, match["sentence"])
        path.append((column, name))
    return tree


def classes() -> dict[str, type[Exception]]:
    return {
        name: item
        for name, item in vars(errors).items()
        if inspect.isclass(item) and item.__module__ == errors.__name__
    }


def test_tree_is_the_classes() -> None:
    real = {
        name: None if item.__bases__ == (Exception,) else item.__bases__[0].__name__
        for name, item in classes().items()
    }
    assert {name: parent for name, (parent, _) in drawn_tree().items()} == real


def test_tree_is_in_the_order_of_the_file() -> None:
    assert list(drawn_tree()) == list(classes())


@pytest.mark.parametrize("name", [name for name in drawn_tree() if name != "FireboxError"])
def test_docstring_says_what_the_tree_says(name: str) -> None:
    def plain(text: str) -> str:
        return re.sub(r"\W+", " ", text).strip().lower()

    first = plain((classes()[name].__doc__ or "").split(".")[0])
    drawn = plain(drawn_tree()[name][1].split("(")[0])
    assert drawn.startswith(first) or first.startswith(drawn), (first, drawn)


def test_hint_is_kept_beside_the_message() -> None:
    error = errors.ConfigError("threads is 0", hint="at least 1")
    assert (str(error), error.hint) == ("threads is 0", "at least 1")
    assert errors.ConfigError("threads is 0").hint is None


def test_request_errors_carry_param_and_code() -> None:
    error = errors.ContextTooLong("prompt has 9 tokens", param="prompt")
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")
    assert errors.QueueFull("full", retry_after_s=3).retry_after_s == 3


def test_request_error_codes_differ() -> None:
    kinds = [item for item in classes().values() if issubclass(item, errors.RequestError)]
    codes = [item.code for item in kinds]
    assert len(kinds) >= 5
    assert len(set(codes)) == len(codes), codes
    assert all(re.fullmatch(r"[a-z_]+", code) for code in codes)
