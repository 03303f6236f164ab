"""Random weights of a like distribution (`--load-format dummy`), for work on speed and memory without a
checkpoint.

Not zeros: routing must spread over the experts and activations must keep their size, or a measurement means
nothing. What a tensor holds follows from the end of its name:

    norms                              1
    e_score_correction_bias            0: nothing but the scores chooses
    other biases, sinks                N(0, 0.02²)
    embedding                          N(0, 1): tokens stay apart from what attention mixes into all of them
    A_log, dt_bias                     states that forget within 1 to 1,000 tokens, as gated delta nets begin
    matrices, routers, convolutions    N(0, 1 / input features)

Values go where the weight is, in its own dtype: of a quantised weight, into what it is dequantised to, or,
for kernels that read it as it is stored, into codes and scales that come to about the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from firebox.formats.base import Slot
from firebox.models.base import Model
from firebox.weights.load import chosen_slots

BIAS = 0.02
DECAY = (1.0, 16.0)  # exp(A_log), uniform
STEP = (0.001, 0.1)  # softplus(dt_bias), uniform in its logarithm


def load_dummy(model: Model, seed: int = 0, on_filled: Callable[[Slot], None] = lambda slot: None) -> None:
    """Fills every slot, the same way for the same seed and device, and lets the model finish. What a
    checkpoint may lack stays as it is. `on_filled` as for `load_weights`."""
    generators: dict[torch.device, torch.Generator] = {}
    for slot in chosen_slots(model, None):
        if all(spec.optional for spec in slot.tensors.values()):
            continue
        device = getattr(slot, "device", slot.target.device)
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        _fill(slot, generators[device])
        on_filled(slot)
    model.finish()


def _fill(slot: Slot, generator: torch.Generator) -> None:
    invent = getattr(slot, "invent", None)  # of what is kept as it is stored
    if invent is not None:
        invent(generator)
        return
    target, name = slot.target, next(iter(slot.tensors))
    if name.endswith("e_score_correction_bias"):
        target.zero_()
    elif name.endswith("A_log"):
        target.uniform_(*DECAY, generator=generator).log_()
    elif name.endswith("dt_bias"):
        target.uniform_(*map(math.log, STEP), generator=generator)  # softplus(log t) ≈ t for t this small
    elif name.endswith(("bias", "sinks")):
        target.normal_(0.0, BIAS, generator=generator)
    elif target.dim() == 1:
        target.fill_(1.0)
    elif name.endswith("embed_tokens.weight"):
        target.normal_(0.0, 1.0, generator=generator)
    else:
        target.normal_(0.0, target.shape[-1] ** -0.5, generator=generator)
