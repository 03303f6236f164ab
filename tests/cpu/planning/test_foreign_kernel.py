"""The product that tuning files are judged by is the product of its formula: run under Triton's interpreter,
in a process of its own because the interpreter is chosen when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
import triton.language as tl
from firebox.planning._foreign_kernel import expert_product

scales, kind, routed, group_m, rows_per_token = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.manual_seed(1)
M, N, K, TOKENS, EXPERTS, TOP_K, SN, SK = 16, 32, 32, 21, 5, 3, 16, 32
n, k, rows = 40, 80, TOKENS * TOP_K
if scales == "group":
    SK = 16
ids = torch.randint(0, EXPERTS - 1, (rows,))  # the last expert has no rows
order, experts = [], []
for e in range(EXPERTS):
    mine = torch.where(ids == e)[0].tolist()
    mine += [rows] * (-len(mine) % M)
    order += mine
    experts += [e] * (len(mine) // M)
padded = torch.tensor([len(order)], dtype=torch.int32)
order += [rows] * (2 * M)  # launched for the most there could be; these programs end at once
sorted_rows = torch.tensor(order, dtype=torch.int32)
experts = torch.tensor(experts + [10**6] * 2, dtype=torch.int32)

given = TOKENS if rows_per_token > 1 else rows
if kind == "int8":
    x = torch.randint(-128, 128, (given, k), dtype=torch.int8)
else:
    x = torch.full((given * k + K,), float("nan"))[: given * k].view(given, k).copy_(torch.randn(given, k))
if kind == "float":
    stored = w = torch.randn(EXPERTS, n, k)
elif kind == "int4":
    codes = torch.randint(0, 16, (EXPERTS, n, k), dtype=torch.uint8)
    stored, w = codes[..., ::2] | codes[..., 1::2] << 4, codes.float() - 8
else:
    stored = torch.randint(-128, 128, (EXPERTS, n, k), dtype=torch.int8)
    w = stored.float()
x_scale, w_scale = torch.ones(1), torch.ones(1)
xs, ws = torch.ones(given, 1), torch.ones(EXPERTS, 1, 1)
groups = -(-k // SK)
if scales == "tensor":
    x_scale, w_scale = torch.rand(1), torch.rand(EXPERTS)
    xs, ws = x_scale.expand(given, 1), w_scale.view(-1, 1, 1)
if scales in ("weight", "channel"):
    w_scale = torch.rand(EXPERTS, n)
    ws = w_scale.unsqueeze(-1)
if scales == "channel":
    x_scale = torch.rand(given)
    xs = x_scale.unsqueeze(-1)
if scales == "block":
    x_scale, w_scale = torch.rand(given, groups), torch.rand(EXPERTS, -(-n // SN), groups)
    xs = x_scale.repeat_interleave(SK, 1)[:, :k]
    ws = w_scale.repeat_interleave(SN, 1)[:, :n].repeat_interleave(SK, 2)[..., :k]
if scales == "group":
    w_scale = torch.rand(EXPERTS, n, groups)
    ws = w_scale.repeat_interleave(SK, 2)[..., :k]
route = torch.rand(rows)
expected = torch.einsum("rk,rnk->rn", (x.float() * xs)[torch.arange(rows) // rows_per_token], (w * ws)[ids])
if routed:
    expected *= route.unsqueeze(1)

out = torch.full((rows + 1, n), float("nan"), dtype=torch.bfloat16)
exact = kind == "int8" and scales != "block"
grid = len(experts) * -(-n // N)
expert_product[(grid,)](
    x, stored, out, x_scale, w_scale, route, sorted_rows, experts, padded,
    rows, n, k, rows_per_token, group_m,
    BLOCK_M=M, BLOCK_N=N, BLOCK_K=K, SCALES=scales if scales != "none" else "", SCALE_N=SN, SCALE_K=SK,
    INT4=kind == "int4", ROUTED=bool(routed), TMA=False, ACC=tl.int32 if exact else tl.float32,
    COMPUTE=tl.int8 if kind == "int8" else tl.float32,
)
assert out[-1].isnan().all(), "a guard row was written"
beyond = (out[:-1].float() - expected).abs() - expected.abs() / 2**7
print(float(beyond.max() / expected.square().mean().sqrt()))
"""


@pytest.mark.parametrize(
    ("scales", "kind", "routed", "group_m", "rows_per_token"),
    [
        ("none", "float", 0, 1, 3),
        ("none", "float", 1, 4, 1),
        ("tensor", "float", 0, 2, 3),
        ("weight", "weight8", 0, 1, 3),
        ("channel", "int8", 1, 3, 1),
        ("block", "int8", 0, 8, 3),
        ("block", "float", 1, 1, 1),
        ("group", "int4", 0, 1, 3),
    ],
)
def test_the_product_is_its_formula(
    scales: str, kind: str, routed: int, group_m: int, rows_per_token: int
) -> None:
    """Rows, columns and depth that tiles do not divide, NaN behind x, an expert without rows, padding,
    programs past the end. The result is bf16, which the interpreter rounds towards zero: up to 2⁻⁷ of each
    value. What is beyond that is float32's order of sums, in units of the RMS."""
    arguments = [scales, kind, *(str(number) for number in (routed, group_m, rows_per_token))]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 1e-4
