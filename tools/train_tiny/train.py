"""Stage `train`: bf16 arithmetic over fp32 weights, main model and MTP layer together, then the export.

    loss = CE(main, x[t+1]) + mtp_weight * CE(mtp, x[t+2]) + mtp_distill_weight * KL(main at t+1 || mtp at t)

The last term makes drafts that the main model would choose itself, which is what acceptance means. Later in
the run repeats.py adds its term, in place of the cross entropies, for its own rows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.train_tiny import export
from tools.train_tiny.batches import Arrays, Batch, batches, documents, make_batch
from tools.train_tiny.model import TinyModel
from tools.train_tiny.optimizer import Optimizer
from tools.train_tiny.repeats import Repeats, repeat_loss
from tools.train_tiny.spec import WORK, Recipe, Sizes

REPORT_EVERY_STEPS = 250
REPORTED = ("main", "draft", "distill", "accepted")
Losses = dict[str, Tensor]


def train(sizes: Sizes, recipe: Recipe, device: str, folder: Path) -> None:
    """Trains, prints a line now and then, writes the model folder, and training.json into the work folder."""
    torch.manual_seed(recipe.seed)
    arrays = dict(np.load(WORK / "tokens.npz"))
    model = TinyModel(sizes, recipe.dropout).to(device)
    optimizer = Optimizer(model, recipe.weight_decay)
    probe = held_out_probe(arrays, recipe, device)
    history, started = [], time.monotonic()
    model.train()
    for step, batch in enumerate(schedule(arrays, recipe, device)):
        losses = training_losses(model, batch, recipe, device)
        losses["total"].backward()
        rate = learning_rate(step, recipe)
        optimizer.step(rate)
        for router in model.routers():
            router.balance(recipe.balance_rate * rate / recipe.learning_rate)
        if (step + 1) % REPORT_EVERY_STEPS == 0 or step + 1 == recipe.steps:
            history.append(report(step + 1, losses, model, probe, recipe, device, started))
    seconds = time.monotonic() - started
    export.write_model(model, folder)
    description = summary(recipe, seconds, history, device)
    (WORK / "training.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def schedule(arrays: Arrays, recipe: Recipe, device: str) -> Iterator[Batch]:
    """`recipe.steps` batches: short windows first, whole-context windows at the end."""
    long_steps = int(recipe.steps * recipe.long_share)
    short = batches(arrays, recipe, recipe.window_tokens, device, recipe.seed)
    long = batches(arrays, recipe, recipe.long_window_tokens, device, recipe.seed + 1)
    repeats = Repeats(arrays["file_ids"], arrays["line_starts"], recipe.seed + 2)
    for step in range(recipe.steps):
        batch = next(short if step < recipe.steps - long_steps else long)
        early = step < recipe.steps * recipe.repeat_start
        yield batch if early else repeats.put_into(batch, recipe.repeat_rows)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to zero at the last step."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def training_losses(model: TinyModel, batch: Batch, recipe: Recipe, device: str) -> Losses:
    """The loss terms, each a scalar; `total` is the one to minimise."""
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        hidden = model(batch.ids, batch.mask)
        logits = model.head(hidden)
        draft_logits = model.head(model.draft(hidden, batch.next_ids, batch.mask))
    logits, draft_logits = logits.float(), draft_logits.float()  # [rows, window, vocab]
    main = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    draft = F.cross_entropy(draft_logits.flatten(0, 1), batch.draft_targets.flatten())
    inside = batch.inside[:, :-1].float()
    teacher, student = logits[:, 1:].detach().log_softmax(-1), draft_logits[:, :-1].log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)  # [rows, window - 1]
    distill = (divergence * inside).sum() / inside.sum()
    accepted = ((logits[:, 1:].argmax(-1) == draft_logits[:, :-1].argmax(-1)) * inside).sum() / inside.sum()
    total = main + recipe.mtp_weight * draft + recipe.mtp_distill_weight * distill
    if batch.repeats is not None:
        rows = batch.repeats.shape[1]
        repeats = repeat_loss(logits[-rows:], batch.next_ids[-rows:], batch.repeats)
        total = total + recipe.repeat_weight * repeats
    return {"total": total, "main": main, "draft": draft, "distill": distill, "accepted": accepted}


def held_out_probe(arrays: Arrays, recipe: Recipe, device: str) -> Batch:
    """One fixed batch of held-out windows, to watch the run by; the real measure is `evaluate`."""
    window = recipe.window_tokens + 2
    held_out = documents(arrays, "held_out")
    segments = np.repeat(np.arange(len(held_out)), arrays["held_out_lengths"])
    ids = np.concatenate(held_out).astype(np.int64)
    count = len(ids) // window
    chosen = np.linspace(0, count - 1, recipe.batch_tokens // recipe.window_tokens).astype(int)
    rows = torch.from_numpy(ids[: count * window].reshape(count, window)[chosen]).to(device)
    numbers = torch.from_numpy(segments[: count * window].reshape(count, window)[chosen]).to(device)
    return make_batch(rows, numbers)


@torch.no_grad()
def report(
    step: int, losses: Losses, model: TinyModel, probe: Batch, recipe: Recipe, device: str, started: float
) -> dict:
    """Prints and returns where the run stands: both losses, draft acceptance, expert balance."""
    busiest = max(float(router.load.max() / router.load.mean()) for router in model.routers())
    model.eval()
    held_out = training_losses(model, probe, recipe, device)
    model.train()
    seconds = round(time.monotonic() - started, 1)
    line = {"step": step, "seconds": seconds, "busiest_expert": round(busiest, 2)}
    for name, values in (("train", losses), ("held_out", held_out)):
        line |= {f"{name}_{key}": round(float(values[key].detach()), 4) for key in REPORTED}
    print(json.dumps(line), flush=True)
    return line


def summary(recipe: Recipe, seconds: float, history: list[dict], device: str) -> dict:
    """What the card says about the run."""
    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    tokens = recipe.steps * recipe.batch_tokens
    return {
        "recipe": vars(recipe),
        "seconds": round(seconds, 1),
        "tokens": tokens,
        "tokens_per_s": round(tokens / seconds),
        "hardware": hardware,
        "torch": torch.__version__,
        "history": history,
    }
