"""Stage `evaluate`: measures the exported folder, in fp32, and writes evaluation.json into the work folder.

Compression: every held-out file is scored in windows of the whole context that overlap by half; each token is
scored once, in the first window that reaches it, the first token after `<|endoftext|>`; the closing
`<|endoftext|>` is paid for too. Drafts: the MTP layer's argmax at t against the main model's argmax at t + 1,
on the same windows, and again along greedy continuations (the acceptance that speculative decoding would
see). Agreement: the same ids through transformers and through the training model.
"""

from __future__ import annotations

import lzma
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tools.train_tiny import export
from tools.train_tiny.batches import Arrays, documents
from tools.train_tiny.model import TinyModel
from tools.train_tiny.spec import END_ID

PROMPTS = ("def fibonacci(", "import os\n", "class Stack:\n", "for i in range(", "# Sort the list\ndef ")
CHATS = (
    "Write a Python function `add(a, b)`: Return the sum of a and b.",
    "Write a Python function `is_palindrome(text)`: Return True if text reads the same backwards.",
    "Write a Python function `read_lines(path)`: Read a file and return its lines.",
)


@dataclass
class Tally:
    """Sums over scored tokens."""

    bytes: int = 0
    tokens: int = 0
    nats: float = 0.0
    correct: int = 0
    drafts: int = 0
    accepted: int = 0
    files: int = 0
    parts: dict[str, list[float]] = field(default_factory=dict)


def evaluate(folder: Path, arrays: Arrays, paths: list[str], device: str) -> dict:
    """All figures of the card, as one dictionary."""
    torch.set_float32_matmul_precision("highest")
    model = export.read_model(folder).to(device)
    reference = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    assert reference.dtype == torch.float32, reference.dtype
    started = time.monotonic()
    figures = compression(model, arrays, paths, device)
    figures["scoring_seconds"] = round(time.monotonic() - started, 1)
    figures |= agreement(model, reference, arrays, device)
    figures |= continuations(model, reference, arrays, device)
    figures["samples"] = samples(reference, folder, device)
    figures |= {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "stored_parameters": sum(tensor.numel() for _, tensor, _ in export.checkpoint_tensors(model)),
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return figures


def compression(model: TinyModel, arrays: Arrays, paths: list[str], device: str) -> dict:
    """Bits per byte, losses, and teacher-forced draft acceptance on the held-out files, beside xz."""
    lengths = arrays["held_out_byte_lengths"]
    texts = [text.tobytes() for text in np.split(arrays["held_out_bytes"], np.cumsum(lengths)[:-1])]
    tally = Tally()
    for path, ids, text in zip(paths, documents(arrays, "held_out"), texts, strict=True):
        before = tally.nats
        score_document(model, torch.from_numpy(ids.astype(np.int64)).to(device), tally)
        tally.files, tally.bytes = tally.files + 1, tally.bytes + len(text)
        part = tally.parts.setdefault("tests" if "test" in path else "library", [0.0, 0.0])
        part[0], part[1] = part[0] + tally.nats - before, part[1] + len(text)
    joined = arrays["held_out_bytes"].tobytes()
    extreme = 9 | lzma.PRESET_EXTREME
    bits = 8 / len(joined)
    return {
        "held_out_files": tally.files,
        "held_out_bytes": tally.bytes,
        "held_out_tokens": tally.tokens,
        "held_out_loss": tally.nats / tally.tokens,
        "held_out_accuracy": tally.correct / tally.tokens,
        "bits_per_byte": tally.nats / np.log(2) / tally.bytes,
        **{f"bits_per_byte_{name}": nats / np.log(2) / size for name, (nats, size) in tally.parts.items()},
        "xz_9_bits_per_byte": len(lzma.compress(joined, preset=9)) * bits,
        "xz_9e_bits_per_byte": len(lzma.compress(joined, preset=extreme)) * bits,
        "xz_9e_per_file_bits_per_byte": sum(len(lzma.compress(text, preset=extreme)) for text in texts)
        * bits,
        "draft_acceptance_held_out": tally.accepted / tally.drafts,
    }


@torch.no_grad()
def score_document(model: TinyModel, ids: Tensor, tally: Tally) -> None:
    """Adds one document, ids [tokens] with its start and end marks, to the tally."""
    context = model.sizes.max_context_tokens
    scored = 1  # ids[0] is given
    while scored < len(ids):
        start = 0 if scored == 1 else scored - context // 2
        window = ids[start : start + context + 1]
        hidden = model(window[None, :-1])
        logits = model.head(hidden)[0]  # row t: window[t + 1]
        drafts = model.head(model.draft(hidden, window[None, 1:]))[0].argmax(-1)  # row t: window[t + 2]
        first = scored - start - 1  # the first row whose target is not scored yet
        choices, targets = logits.argmax(-1), window[1:]
        tally.nats += float(F.cross_entropy(logits[first:].double(), targets[first:], reduction="sum"))
        tally.correct += int((choices[first:] == targets[first:]).sum())
        tally.accepted += int((drafts[first:-1] == choices[first + 1 :]).sum())
        tally.drafts += len(choices) - first - 1
        tally.tokens += len(targets) - first
        scored = start + len(window)


@torch.no_grad()
def agreement(model: TinyModel, reference: PreTrainedModel, arrays: Arrays, device: str) -> dict:
    """Largest difference of logits to transformers, over 8 × 512 tokens and one whole context."""
    ids = np.concatenate([document for document in documents(arrays, "held_out") if len(document) > 4200][:4])
    worst = 0.0
    for rows in (ids[: 8 * 512].reshape(8, 512), ids[: model.sizes.max_context_tokens][None]):
        window = torch.from_numpy(rows.astype(np.int64)).to(device)
        difference = model.head(model(window)) - reference(window).logits
        worst = max(worst, float(difference.abs().max()))
    return {"max_logit_difference_to_transformers": worst}


@torch.no_grad()
def continuations(model: TinyModel, reference: PreTrainedModel, arrays: Arrays, device: str) -> dict:
    """Greedy continuations of held-out text: draft acceptance along them, and how many end up in a loop."""
    prompt_tokens, new_tokens = 256, 192
    held_out = [document for document in documents(arrays, "held_out") if len(document) > 2 * prompt_tokens]
    window = torch.from_numpy(np.stack([ids[:prompt_tokens] for ids in held_out]).astype(np.int64)).to(device)
    ids = greedy(reference, window, new_tokens)
    drafts = model.head(model.draft(model(ids[:, :-1]), ids[:, 1:])).argmax(-1)  # column t drafts ids[t + 2]
    accepted = drafts[:, prompt_tokens - 1 : -1] == ids[:, prompt_tokens + 1 :]
    alive = (ids[:, prompt_tokens:-1] != END_ID).cummin(dim=1).values
    return {
        "continuations": len(held_out),
        "draft_acceptance_generated": float((accepted & alive).sum() / alive.sum()),
        "continuations_looping": sum(loops(row.tolist()) for row in ids[:, prompt_tokens:]),
    }


def greedy(reference: PreTrainedModel, ids: Tensor, new_tokens: int) -> Tensor:
    """ids [rows, tokens] and their greedy continuation by transformers."""
    mask = torch.ones_like(ids)
    return reference.generate(ids, max_new_tokens=new_tokens, do_sample=False, attention_mask=mask)


def loops(ids: list[int], tail: int = 96) -> bool:
    """Whether the last `tail` ids repeat one passage: some 12-gram of them occurs four times or more."""
    end = ids[-tail:]
    grams = Counter(tuple(end[i : i + 12]) for i in range(len(end) - 11))
    return ids[-1] != END_ID and max(grams.values()) >= 4


def samples(reference: PreTrainedModel, folder: Path, device: str) -> list[dict]:
    """Greedy answers to a few fixed prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = []
    prompts = [(prompt, prompt) for prompt in PROMPTS]
    for chat in CHATS:
        messages = [{"role": "user", "content": chat}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts.append((chat, rendered))
    for shown, prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        new = greedy(reference, ids, 160)[0, ids.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        answers.append({"prompt": shown, "text": text, "ended": bool(new[-1] == END_ID)})
    return answers
