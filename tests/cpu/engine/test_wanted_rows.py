"""Only the last token of a prompt is asked for its hidden state: the last block's MLP computes no others, and
none at all while the prompt's end is still to come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from firebox.find import load
from firebox.layers.decoder import Decoder
from tests.support.checkpoints import load_reference, reference_greedy, write_checkpoint
from tests.support.engine import GREEDY, InProcessEngine

PROMPT = list(range(5, 45))
CHUNK = 16  # tokens of it in a step: 16, 16, 8


class Counting:
    """A block's MLP, which notes how many tokens it is given."""

    def __init__(self, mlp: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.mlp, self.tokens = mlp, list[int]()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.tokens.append(len(x))
        return self.mlp(x)


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_5_moe_text", "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(request.param), load("models", request.param).TINY)


@pytest.fixture(scope="module")
def engine(folder: Path) -> InProcessEngine:
    return InProcessEngine(folder, "float32", prefill_chunk_tokens=CHUNK, prefix_cache=False)


def counted(engine: InProcessEngine) -> tuple[Counting, Counting]:
    """The MLPs of the first and of the last block, from now on."""
    model: Any = engine.runner.model
    assert isinstance(model, Decoder)
    blocks = [(attention, getattr(mlp, "mlp", mlp)) for attention, mlp in model.blocks]
    first, last = Counting(blocks[0][1]), Counting(blocks[-1][1])
    model.blocks = ((blocks[0][0], first), *blocks[1:-1], (blocks[-1][0], last))
    return first, last


def test_the_last_mlp_computes_what_is_wanted(folder: Path, engine: InProcessEngine) -> None:
    first, last = counted(engine)
    (ids,) = engine.generate([PROMPT], msgspec.structs.replace(GREEDY, max_tokens=4))
    assert first.tokens == [16, 16, 8, 1, 1, 1]
    assert last.tokens == [1, 1, 1, 1]
    assert ids == reference_greedy(load_reference(folder), PROMPT, 4)


def test_prompts_beside_decoding_requests(engine: InProcessEngine) -> None:
    alone = [engine.generate([prompt])[0] for prompt in (PROMPT, PROMPT[::-1])]
    engine.submit(PROMPT)
    while not engine.step():
        pass  # until it has its first token
    first, last = counted(engine)
    later = engine.generate([PROMPT[::-1]])
    assert later == alone[1:]
    assert first.tokens[:3] == [1 + 16, 1 + 16, 1 + 8] and last.tokens[:3] == [1, 1, 2]


def test_a_prompts_logprobs_want_every_row(engine: InProcessEngine) -> None:
    first, last = counted(engine)
    params = msgspec.structs.replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    engine.generate([PROMPT], params)
    assert first.tokens == last.tokens == [16, 16, 8]
