"""Runs the kernels of dense linear layers in one weight format under Triton's interpreter, on the CPU, in
float16, and prints their errors as JSON: case → relative error. A process of its own, because Triton decides
when it is imported.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_linear FORMAT GROUP
"""

from __future__ import annotations

import json
import sys

import torch

from firebox.hardware.base import find_gpu
from firebox.kernels import linear, linear_few, linear_one, quantise_fp8, rms_norm
from firebox.kernels._linear import Problem
from firebox.kernels.launch import Launcher
from tests.support import quick_interpreter
from tests.support.experts import relative_error
from tests.support.linear import DTYPES, random_weights

GPU = find_gpu("gb10")
NAN = float("nan")
# One rounding of the output to float16 (2⁻¹² at most, 1.4 · 10⁻⁴ RMS of it); a 4-bit weight times its scale
# once more. Outputs in float32 have only the latter, and block scales that are moved to x, in float16.
LIMIT = 3e-4
F32_LIMIT = 2e-6
ROUNDED_TWICE = (("int4_zero", "few"), ("int4_zero", "many"), ("fp8_block", "whole slices"))


def beyond(format: str, errors: dict[str, float]) -> dict[str, float]:
    """The cases whose error is not below its limit."""
    twice = [part for rounded, part in ROUNDED_TWICE if rounded == format]
    exact = {case for case in errors if "192 ×" in case and not any(part in case for part in twice)}
    return {case: e for case, e in errors.items() if not e < (F32_LIMIT if case in exact else LIMIT)}


class Case:
    """One problem with weights, inputs and guarded outputs."""

    def __init__(self, p: Problem, tokens: int, generator: torch.Generator) -> None:
        self.p, self.tokens, self.weights = p, tokens, random_weights(p, generator)
        self.x = torch.randn(tokens, p.columns, generator=generator).half()
        self.residual = torch.randn(tokens, p.rows, generator=generator).half() if p.residual else None

    def few(self, config: linear_few.Config) -> float:
        p, out = self.p, self._out()
        sums, tiles = linear_few.scratch(p, self.tokens, config)
        partial, counters = torch.full((sums + 1,), NAN), torch.zeros(tiles + 1, dtype=torch.int32)
        partial[-1], counters[-1] = 7.0, 7
        launcher = Launcher(linear_few.request(p, self.tokens, config, GPU, interpreted=True))
        linear_few.run(
            launcher, p, self.x, self.weights, self.residual, partial, out[: self.tokens], counters
        )
        assert partial[-1] == 7.0 and counters[-1] == 7 and not counters[:-1].any()
        return self._error(out, self.x)

    def one(self, config: linear_one.Config) -> float:
        out = self._out()
        launcher = Launcher(linear_one.request(self.p, config, GPU, interpreted=True))
        linear_one.run(launcher, self.p, self.x, self.weights, self.residual, out[:1])
        return self._error(out, self.x)

    def normed_one(self, config: linear_one.Config, eps: float = 0.1) -> float:
        """`eps` as large as to show."""
        out, gain = self._out(), torch.rand(self.p.columns, generator=torch.Generator().manual_seed(1)).half()
        launcher = Launcher(linear_one.request(self.p, config, GPU, eps=eps, interpreted=True))
        linear_one.run(launcher, self.p, self.x, self.weights, self.residual, out[:1], gain)
        norm = rms_norm.Problem(self.p.columns, eps, dtype=self.p.dtype)
        return self._error(out, rms_norm.reference(norm, self.x, gain)["out"])

    def many(self, config: linear.Config, *, in_place: bool = False) -> float:
        """With slices two launches, of the same counters and with other sums left over."""
        p, x, x_scale, exact = self.p, self.x, None, self.x
        if linear.quantised(p):
            rows = quantise_fp8.Problem(p.columns, linear.x_group(p), p.dtype)
            x_scale = torch.full_like(quantise_fp8.reference(rows, x)[1], NAN)
            x = torch.full(x.shape, NAN, dtype=torch.float8_e4m3fn)
            quantise_fp8.run(Launcher(quantise_fp8.request(rows, GPU, interpreted=True)), self.x, x, x_scale)
            wide = x.float().unflatten(-1, (-1, rows.group or p.columns)) * x_scale.view(self.tokens, -1, 1)
            exact = wide.flatten(-2)
        launcher = Launcher(linear.request(p, config, GPU, interpreted=True))
        sums, tiles = linear.scratch(p, self.tokens, config)
        partial, counters = torch.full((sums + 1,), NAN), torch.zeros(tiles + 1, dtype=torch.int32)
        partial[-1], counters[-1] = 7.0, 7
        outs = []
        for left in (NAN, 1.0) if sums else (NAN,):
            partial[:-1] = left
            out, residual = self._out(), self.residual
            if in_place and residual is not None:
                out[: self.tokens] = residual
                residual = out[: self.tokens]
            linear.run(launcher, p, x, x_scale, self.weights, residual, partial, out[: self.tokens], counters)
            assert partial[-1] == 7.0 and counters[-1] == 7 and not counters[:-1].any()
            outs.append(out)
        assert torch.equal(outs[0], outs[-1]), "what was left over is in the result"
        return self._error(out, exact)

    def _out(self) -> torch.Tensor:
        out = torch.full((self.tokens + 1, self.p.rows), NAN, dtype=DTYPES[self.p.out_dtype])
        out[-1] = 7.0
        return out

    def _error(self, out: torch.Tensor, x: torch.Tensor) -> float:
        assert (out[-1] == 7.0).all(), "a row behind the output was written"
        wanted = linear_few.reference(self.p, x, self.weights, self.residual)
        return relative_error(out[:-1], wanted)


def main(format: str, group: int) -> None:
    quick_interpreter.begin()
    generator, found = torch.Generator().manual_seed(0), {}
    unit = 128 if format == "fp8_block" else max(group, 16)
    deep = max(linear_few.depths(Problem(64, 4096, format, group))[0], 128)
    # rows that leave a part of a tile; columns that leave a part of a step, of a head and of a slice
    odd = -(-(2 * deep + deep // 2) // unit) * unit
    small = Problem(80, odd, format, group, True, True, "f16", "f16")
    large = Problem(192, 5 * deep, format, group, False, False, "f16", "f32")
    tiles = {
        "one slice": linear_few.Config(32, 0, deep, 1),
        "slices": linear_few.Config(64, 0, deep, 2),
        "heads": linear_few.Config(32, deep, deep, 2),
        "whole slices": linear_few.Config(64, 2 * deep, deep, 3, 4, 1),
    }
    for p, all_tokens in ((small, (1, 9)), (large, (5, 17))):
        for tokens in all_tokens:
            case = Case(p, tokens, generator)
            for name, config in tiles.items():
                found[f"few {p.rows} × {p.columns} {tokens} {name}"] = case.few(config)
        if linear_one.accepts(p, GPU) is None:
            case = Case(p, 1, generator)
            for config in (linear_one.Config(1, 4), linear_one.Config(16, 8)):
                found[f"one {p.rows} × {p.columns} {config.rows} rows"] = case.one(config)
                found[f"normed one {p.rows} × {p.columns} {config.rows} rows"] = case.normed_one(config)
        if linear.accepts(p, GPU) is None:
            case = Case(p, 40, generator)
            for slices in (1, 2, 3):
                config = linear.Config(64, 32, deep, warps=1, band=2, slices=slices)
                assert linear.division(p, config)[1] == slices
                name = f"many {p.rows} × {p.columns} {case.tokens} slices {slices}"
                found[name] = case.many(config, in_place=slices == 3)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
