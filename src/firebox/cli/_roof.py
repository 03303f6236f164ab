"""The roof that `bench` and `audit` hold numbers against, from their options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from firebox.errors import ConfigError

if TYPE_CHECKING:
    from firebox.bench.roofline import Roofline


def roof_of(card: str | None, gpu: str | None, gpus: int | None, tp: int | None) -> Roofline | None:
    """The roof of `card` on `gpus` GPUs of this kind, or cut with `tp`; None if nothing is named. Raises
    ConfigError for half a machine."""
    if card is None and gpu is None and gpus is None and tp is None:
        return None
    if card is None or gpu is None:
        raise ConfigError("--card and --gpu belong together", hint="--card glm-4.7-nvfp4 --gpu gb10 --tp 4")
    if gpus is not None and tp is not None:
        raise ConfigError(
            "--gpus and --tp say the same", hint="--tp for tensor parallelism, --gpus for others"
        )
    from firebox.bench.roofline import roofline
    from firebox.cli._fit_model import source_of
    from firebox.hardware.base import find_gpu

    return roofline(source_of(card, "auto"), find_gpu(gpu), tp or gpus or 1, tp=tp is not None)
