"""The training loop behind localized fine-tuning, the unlearning objectives, LoRA and relearning.

AdamW without weight decay, cosine from the full rate to 0 without warm-up, gradient norm clipped, gradients
accumulated over chunks, evaluation mode throughout (spec section 4.1).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers import provenance
from helpers.chunks import is_out_of_memory
from helpers.models import Model
from helpers.progress import progress
from helpers.unlearning.forward import hidden_states
from helpers.unlearning.terms import Residuals, Term

Watch = Callable[[int], dict[str, float]]


class TrainingError(ValueError):
    """Training that cannot start, or cannot go on from a checkpoint."""


@dataclass(frozen=True)
class Settings:
    """How to train. The defaults are the paper's, but for the learning rate, which depends on the model.

    `batch` examples a term and step are worked off `chunk` at a time; the chunk decides about memory, not about
    the result. When memory runs out it is halved by itself, and from a chunk of one row on training goes on with
    `recompute`. `clip` None does not clip. `format`: the prompts
    trained on; `text_tokens`: how much of each text. `masters`: fp32 copies of bf16 weights.
    `autocast`: matrix products in bf16 over fp32 weights; off, because it saves a CPU with bf16 instructions little (an edit takes
    .7 to .9 of the time, by mask: `benchmarks.editing`), and rows would depend on the CPU. `cache`: do shared work once, that is keep the
    residual below the lowest masked block, and run the tokens that all prompts begin with once a chunk. `recompute`:
    gradient checkpointing, for less memory and more time. `checkpoint_every`: steps between checkpoints, where a file is given.
    """

    learning_rate: float = 1e-3
    forget_weight: float = 1.0
    retain_weight: float = 1.0
    text_weight: float = 1.0
    steps: int = 50
    batch: int = 64
    chunk: int = 64
    clip: float | None = 1.0
    text_tokens: int = 100
    format: str = "one_shot"
    masters: bool = True
    autocast: bool = False
    cache: bool = True
    recompute: bool = False
    checkpoint_every: int = 10

    def __post_init__(self):
        for name in ("steps", "batch", "chunk", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"settings: {name} is {getattr(self, name)}, at least 1 is needed")
        if self.learning_rate <= 0 or (self.clip is not None and self.clip <= 0) or self.text_tokens < 2:
            raise TrainingError("settings: learning_rate and clip are positive, text_tokens at least 2")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def train(model: Model, trained, terms: Sequence[Term], settings: Settings, label: str = "train", checkpoint: Path | None = None,
          identity: str = "", watch: Watch | None = None) -> tuple[pd.DataFrame, str | None]:
    """Train within `with trained:`.

    Returns the history and None, or why training stopped early. One row of the history a step: `step` (updates
    made before), `loss`, the losses of the terms, `grad_norm` before clipping, `learning_rate`, and what
    `watch(step)` returned (called before each update and once after the last, with losses missing there).

    A loss or a gradient that is no finite number ends training with the last weights whose loss was one, and a
    warning says so; at step 0 it raises `TrainingError`. With a `checkpoint` file, training goes on from one of the same
    `identity` and reaches the bits of an uninterrupted run; one of another identity raises.
    """
    if settings.recompute and trained.noisy:
        raise TrainingError("recompute would draw dropout anew in the backward pass: take no dropout, or recompute=False")
    optimizer = torch.optim.AdamW(trained.tensors, lr=settings.learning_rate, weight_decay=0.0, fused=_can_fuse(trained.tensors))
    first, history = _resume(checkpoint, identity, trained, optimizer)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.autocast):
        residuals = prefixes(model, trained.lowest, terms, settings)
    good = None
    for step in progress(range(first, settings.steps), label):
        losses, settings = gradients(model, trained, optimizer.zero_grad, terms, residuals, step, settings)
        row = {"step": step, "loss": sum(term.weight * losses[term.name] for term in terms), **losses}
        if math.isfinite(row["loss"]):
            good = trained.snapshot()  # these weights gave finite losses, whatever their gradient is
        norm = torch.nn.utils.clip_grad_norm_(trained.tensors, settings.clip or math.inf).item()
        history.append({**row, "grad_norm": norm, "learning_rate": settings.rate(step)})
        values = {**{f"the {name} loss": value for name, value in losses.items()}, "the gradient": norm}
        bad = next((name for name, value in values.items() if not math.isfinite(value)), None)
        if bad is not None:
            return _stop(trained, good, history, bad, step)
        if watch is not None:
            history[-1].update(watch(step))
        if checkpoint is not None and step > first and step % settings.checkpoint_every == 0:
            _save(checkpoint, identity, trained, optimizer, step, history[:-1])
        optimizer.param_groups[0]["lr"] = settings.rate(step)
        optimizer.step()
        trained.write()
    if not all(value.isfinite().all() for value in trained.snapshot()):
        return _stop(trained, good, history, "a weight", settings.steps)
    if watch is not None:
        history.append({"step": settings.steps, **watch(settings.steps)})
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return pd.DataFrame(history), None


def gradients(model: Model, trained, clear: Callable[[], object], terms: Sequence[Term], residuals: Sequence[Residuals | None], step: int,
              settings: Settings) -> tuple[dict[str, float], Settings]:
    """(losses of the terms, settings that fit into memory); the gradient of the weighted sum is on `trained.tensors`, cleared by `clear`."""
    while True:
        trained.begin(step)
        clear()
        try:
            losses = [accumulate(model, trained, *pair, step, settings) for pair in zip(terms, residuals)]
            return {term.name: loss for term, loss in zip(terms, losses)}, settings
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not (smaller := _smaller(settings, trained.noisy)):
                raise
        settings = smaller  # half-done gradients are dropped; the step is done again
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _smaller(settings: Settings, noisy: bool) -> Settings | None:
    """The same training in less memory; None where nothing is left to try."""
    if settings.chunk > 1:
        return replace(settings, chunk=settings.chunk // 2)
    return None if settings.recompute or noisy else replace(settings, recompute=True)


def accumulate(model: Model, trained, term: Term, residuals: Residuals | None, step: int, settings: Settings) -> float:
    """Add a term's gradient, chunk by chunk; its mean loss."""
    rows, counts = term.draws[step]
    share = counts * term.size[rows]
    share = (share / share.sum()).float()
    order = term.sequences.lengths[rows].argsort(stable=True)  # rows of like length together: less padding
    # noise drawn for a token must not be the same in every row
    shared, total = term.shared if settings.cache and not (trained.noisy or settings.recompute) else 0, 0.0
    for part in order.split(settings.chunk):
        tokens, mask = term.sequences.batch(rows[part], model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.autocast):
            before = None if residuals is None else residuals.at(rows[part], tokens.shape[1])
            hidden = hidden_states(model, tokens, mask, max(trained.lowest, 0), before, term.stop, shared, settings.recompute)
            loss = term.loss(hidden, mask, rows[part])
            loss = (loss * share[part].to(loss.device)).sum()
        if loss.requires_grad:  # a mask above RMU's layer reaches nothing
            (term.weight * loss).backward()
        total += loss.item()
    return total


def prefixes(model: Model, lowest: int, terms: Sequence[Term], settings: Settings) -> list[Residuals | None]:
    """For each term what the blocks below the lowest trained one give, where a row comes more than once."""
    worth = settings.cache and lowest > 0
    return [Residuals(model, t.sequences, t.used, lowest if t.stop is None else min(lowest, t.stop), settings.chunk)
            if worth and t.repeats > 1 else None for t in terms]


def _stop(trained, good, history: list[dict], bad: str, step: int) -> tuple[pd.DataFrame, str]:
    """Back to the last good weights, saying so; an exception where those are the weights it began with."""
    if good is None or step == 0:
        raise TrainingError(f"{bad} is not finite before the first step: nothing was trained")
    trained.rollback(good)
    kept = step if bad == "the gradient" else step - 1
    stopped = f"{bad} is not finite at step {step}; kept the weights after {kept} steps"
    warnings.warn(f"training stopped: {stopped}", stacklevel=4)
    return pd.DataFrame(history), stopped


def _can_fuse(tensors: Sequence[torch.Tensor]) -> bool:
    return all(t.device.type in ("cpu", "cuda") and t.is_floating_point() for t in tensors)


def _save(path: Path, identity: str, trained, optimizer, step: int, history: list[dict]) -> None:
    arrays = {}
    for number, tensor in enumerate(trained.tensors):
        state = optimizer.state.get(tensor) or {key: torch.zeros_like(tensor) for key in ("exp_avg", "exp_avg_sq")}
        arrays |= {f"{key}.{number}": state[key].contiguous().cpu() for key in ("exp_avg", "exp_avg_sq")}
        arrays[f"weight.{number}"] = tensor.detach().contiguous().cpu()
    meta = {"identity": identity, "step": str(step), "history": json.dumps(history)}
    provenance.write_atomic(path, lambda temporary: save_file(arrays, temporary, metadata=meta))


def _resume(path: Path | None, identity: str, trained, optimizer) -> tuple[int, list[dict]]:
    """Weights and moments as they were when the checkpoint's step began; (step, history)."""
    if path is None or not path.is_file():
        return 0, []
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        if meta["identity"] != identity:
            raise TrainingError(f"{path} belongs to another training (settings, facts, mask, seed or model); "
                                "delete it, or give another file")
        for number, tensor in enumerate(trained.tensors):
            with torch.no_grad():
                tensor.copy_(file.get_tensor(f"weight.{number}"))
            moments = {key: file.get_tensor(f"{key}.{number}").to(tensor.device) for key in ("exp_avg", "exp_avg_sq")}
            device = tensor.device if _can_fuse([tensor]) else "cpu"
            optimizer.state[tensor] = {"step": torch.tensor(float(meta["step"]), device=device), **moments}
    trained.write()
    return int(meta["step"]), json.loads(meta["history"])
