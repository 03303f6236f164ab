"""Kimi-K2.5 and K2.6 (`KimiK25ForConditionalGeneration`): their language model.

Checkpoints: moonshotai/Kimi-K2.5, moonshotai/Kimi-K2.6. The language model is Kimi-K2's, so DeepSeek-V3's;
config.json has it under `text_config`, the tensors under `language_model.`. The vision tower (MoonViT) and
its projector are not read: images in a request are refused by the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from firebox.layers.base import KeptSlot, OneOf, PlainSlot, ScaleSlot, Slot, Slots, StoredSlot, WeightSlot
from firebox.models import deepseek_v3, kimi_k2
from firebox.models.base import require

PREFIX = "language_model."
VISION = ("vision_tower.", "mm_projector.", "model.vision_tower.", "model.mm_projector.")


@dataclass(frozen=True)
class Config(deepseek_v3.Config):
    """DeepSeek-V3's, of a model whose tensors begin with `language_model.`."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads config.json, its text_config merged over it. Raises UnsupportedModel for a value the code
        does not implement."""
        require(config, "model_type", "kimi_k2", "deepseek_v3")  # text_config's own
        return replace(super().from_hf(config), prefix=PREFIX)


class Model(deepseek_v3.Model):
    """DeepSeek-V3 under a prefix."""

    def slots(self) -> Slots:
        """Every tensor under its published name or the one that transformers 5.23 saves it under: it renames
        the vision tower's layers to `blocks`, and the language model's with them."""
        for entry in super().slots():
            if isinstance(entry, ScaleSlot):  # optional, so the first layout would always fit
                yield replace(entry, names=(*entry.names, *map(_saved_name, entry.names)))
                continue
            layouts = entry.layouts if isinstance(entry, OneOf) else ((entry,),)
            yield OneOf((*layouts, *(tuple(map(_as_saved, layout)) for layout in layouts)))

    def unused(self, name: str) -> str | None:
        """The vision tower and its projector."""
        if name.startswith(VISION):
            return "only the language model is served"
        return super().unused(name)


def _as_saved(slot: Slot) -> Slot:
    if isinstance(slot, PlainSlot):
        return replace(slot, name=_saved_name(slot.name))
    if isinstance(slot, KeptSlot):
        return replace(slot, name=_saved_name(slot.name))
    assert isinstance(slot, (WeightSlot, StoredSlot)), slot
    return replace(slot, module=_saved_name(slot.module))


def _saved_name(name: str) -> str:
    return name.replace(f"{PREFIX}model.layers.", f"{PREFIX}model.blocks.")


TINY: dict[str, Any] = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "model_type": "kimi_k25",
    "dtype": "float32",
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "image_token_id": 320,
    "video_token_id": 321,
    "vision_start_token_id": 322,
    "vision_end_token_id": 323,
    "projection_hidden_size": 32,
    "text_config": {**kimi_k2.TINY, "architectures": ["DeepseekV3ForCausalLM"], "q_lora_rank": 48},
    "vision_config": {
        "model_type": "kimi_k25_vision",
        "patch_size": 2,
        "pos_emb_height": 4,
        "pos_emb_width": 4,
        "pos_emb_time": 2,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
    },
}
