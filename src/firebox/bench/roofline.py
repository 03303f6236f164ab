"""The two roofs of a model on its GPUs: what memory bandwidth allows at decode, at any batch, and what matrix
units allow with prompts. Datasheet numbers, so that nothing is faster.

Checked against others' measurements (`tests/cpu/bench/test_roofline.py`), weights only, 4 × GB10, tp 4:
GLM-4.7-NVFP4 68 tok/s at batch 4 and 95 at 8, measured 40.6 and 60.6, which is 59 and 64 %;
Qwen3.5-397B-A17B-NVFP4 174 at batch 8, where good rows have 102, 59 %, and rows of garbage 143 to 156, 82 to
90 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from firebox.bench.claim import Claim
from firebox.errors import ConfigError
from firebox.hardware.base import Gpu
from firebox.planning._parts import refused
from firebox.planning.fit import Opened, Source, open_source
from firebox.planning.roof import matrix_s, weights_bytes


@dataclass(frozen=True)
class Roofline:
    """A model on `gpus` GPUs. `tp` True: cut as tensor parallelism cuts it, with what every GPU has whole;
    False: divided without a remainder, which no way of sharing a model beats."""

    opened: Opened
    gpu: Gpu
    gpus: int
    tp: bool

    @property
    def label(self) -> str:
        """Model and machine, for people."""
        return f"{self.opened.source.name} on {self.gpus} × {self.gpu.name}"

    def decode_tok_s(
        self, requests: float, *, drafts: float = 0, accept_length: float | None = None
    ) -> float:
        """Of all requests together: tokens of a step over the time to read its weights; what caches and a
        draft model read comes on top and is left out.

        A step checks drafts + 1 positions a request, and each takes its experts. `accept_length` tokens of
        them are kept; without it, all.
        """
        kept = accept_length if accept_length is not None else drafts + 1
        positions = requests * max(drafts + 1, kept)
        return requests * kept * self._bandwidth / self._weights_bytes(positions)

    @property
    def prefill_tok_s(self) -> float | None:
        """Prompt tokens of all requests; None where the GPU's rates are not known."""
        seconds = matrix_s(self.opened.parts, self.gpu)
        return None if seconds is None else self.gpus / seconds

    def put_on(self, claim: Claim) -> Claim:
        """The claim with its roofs. Without a concurrency only the roof of one request is known."""
        drafts, kept = claim.drafts or 0.0, claim.accept_length
        one = self.decode_tok_s(1, drafts=drafts, accept_length=kept)
        places = claim.in_flight
        batch = self.decode_tok_s(places, drafts=drafts, accept_length=kept) if places else None
        return msgspec.structs.replace(
            claim, roof_tok_s=batch, roof_request_tok_s=one, prefill_roof_tok_s=self.prefill_tok_s
        )

    @property
    def _bandwidth(self) -> float:
        assert self.gpu.bandwidth_gb_s is not None, self.gpu.name
        return self.gpu.bandwidth_gb_s * 1e9

    def _weights_bytes(self, positions: float) -> float:
        """Of one GPU."""
        if self.tp:
            return weights_bytes(self.opened.parts, self.gpus, positions)
        return weights_bytes(self.opened.parts, 1, positions) / self.gpus


def roofline(source: Source, gpu: Gpu, gpus: int = 1, *, tp: bool = False) -> Roofline:
    """Of a model of which only the config is needed. Raises ConfigError, UnsupportedModel,
    UnsupportedFormat."""
    if gpu.bandwidth_gb_s is None:
        raise ConfigError(f"the memory bandwidth of {gpu.name} is not known", hint="name another --gpu")
    opened = open_source(source, gpu)
    why = refused(opened.parts, gpus) if tp else None
    if why is not None:
        raise ConfigError(f"{source.name} cannot be cut with --tp {gpus}: {why}", hint=f"--gpus {gpus}")
    return Roofline(opened, gpu, gpus, tp)
