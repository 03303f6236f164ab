"""The gated delta net without a GPU: its kernels under Triton's interpreter against their reference, the
reference against the layer's own walk over the tokens, and the launches compiled for GPUs that are not here.
On a GPU: tests/gpu/test_gated_delta.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from firebox.hardware.base import find_gpu
from firebox.kernels import gated_delta_chunk, gated_delta_decode
from firebox.kernels._gated_delta import Problem, reference
from firebox.layers.gated_delta import _unit, delta_rule
from tests.support.experts import relative_error
from tests.support.gated_delta import QWEN, QWEN_TP4, random_inputs, random_layer
from tests.support.interpreted_gated_delta import OUTPUT_LIMIT, beyond
from tests.support.interpreter import check_launches, interpreted


def test_kernels_equal_their_reference_under_the_interpreter() -> None:
    found = interpreted("interpreted_gated_delta")
    assert len(found) == 13
    assert not beyond(found)


@pytest.mark.parametrize("lengths", [[1], [2], [9], [5, 0, 3]])
def test_the_reference_is_the_layers_formula(lengths: list[int]) -> None:
    """Against layers/gated_delta.py's recurrence and PyTorch's own convolution."""
    p, generator = Problem(2, 6, 16, 32, 3, 1e-6, "f16"), torch.Generator().manual_seed(2)
    slots = list(range(len(lengths)))
    layer, inputs = random_layer(p, len(lengths), generator), random_inputs(p, lengths, slots, generator)
    y, conv_state, state = reference(p, layer.weights, inputs, layer.conv_state, layer.state)
    w, first = layer.weights, 0
    for slot, n in enumerate(lengths):
        tokens = slice(first, first + n)
        first += n
        x = torch.cat((layer.conv_state[slot].T, inputs.mixed[tokens].float())).T  # [channels, taps + n]
        assert torch.equal(conv_state[slot].float(), x[:, n:])
        if n == 0:
            assert torch.equal(state[slot].float(), layer.state[slot])
            continue
        mixed = F.silu(F.conv1d(x, w.conv.unsqueeze(1), groups=p.channels)).T
        q, k, v = mixed.split([32, 32, 192], -1)
        q, k = (_unit(part.unflatten(-1, (2, 16))).repeat_interleave(3, 1) for part in (q, k))
        decay = torch.exp(-w.a_log.exp() * F.softplus(inputs.a[tokens].float() + w.dt_bias))
        beta, out = inputs.b[tokens].float().sigmoid(), torch.empty(n, p.heads, p.value_dim)
        matrix = layer.state[slot].clone()
        delta_rule(q * p.key_dim**-0.5, k, v.unflatten(-1, (6, 32)), decay, beta, matrix, out)
        assert relative_error(state[slot], matrix) < 1e-6
        o = out.half().float()
        normed = w.norm * (o * torch.rsqrt(o.pow(2).mean(-1, keepdim=True) + p.eps)).half()
        wanted = (normed * F.silu(inputs.z[tokens].float()).unflatten(-1, (6, 32))).half().flatten(1)
        assert relative_error(y[tokens], wanted) < OUTPUT_LIMIT


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    gpu = find_gpu("gb10")
    assert gated_delta_decode.accepts(QWEN, gpu) is None
    for problem, why in (
        (Problem(3, 4, 128, 128, 3, 1e-6), "multiple of key heads"),
        (Problem(4, 4, 96, 128, 3, 1e-6), "powers of two"),
        (Problem(4, 4, 256, 256, 3, 1e-6), "256 × 256"),
    ):
        refused = gated_delta_decode.accepts(problem, gpu)
        assert refused is not None and why in refused


def test_every_launch_fits() -> None:
    requests = {}
    for name in ("gb10", "h200"):
        gpu = find_gpu(name)
        for heads, problem in (("16 + 64", QWEN), ("4 + 16", QWEN_TP4)):
            config = gated_delta_decode.default(problem, gpu)
            requests[f"{name} decode {heads}"] = gated_delta_decode.request(problem, config, gpu)
            config = gated_delta_chunk.default(problem, gpu)
            for request in gated_delta_chunk.requests(problem, config, gpu):
                requests[f"{name} {request.kernel.__name__} {heads}"] = request
    # what spills is addresses, in a loop of hundreds of matrix instructions
    check_launches(requests, spill_bytes=96)
