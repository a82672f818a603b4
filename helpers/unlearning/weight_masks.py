"""Weight masks (spec section 4.2): learn which single weights to delete.

    where = candidates(model, mask(model, ["mlp 1", "mlp 2", "mlp 3"]))     # see helpers.unlearning.deletions
    learned = learn(model, split, where)                                    # a value m in [0, 1] for each weight
    for chosen in ladder(model, learned.importance, [1000, 3000, 10_000], "learned"):
        with delete(model, chosen).applied(model): ...

Two parametrisations were published. `clamped`: the weight w itself is trained and held between 0 and its first value
w0, m = w / w0. `explicit`: m is trained and held in [0, 1], starting at 1; the weight is m · w0. Both by SGD with
momentum.

The regulariser can be had in two readings, because what was published does not do what it is said to do:

                  published (as read in the code)              towards (the stated aim: few deletions)
    clamped       β · Σ|w| / Σ|w0|                             β · Σ|w0 − w| / Σ|w0|
    explicit      min(β·(step − 15), β) · mean|m − 1|          β · mean|m − 1|
    decay         of w or m, towards 0                         of w − w0 or m − 1, towards w0 or 1

Published, `clamped` pushes every weight to 0 (since |w| ≤ |w0|, its gradient is just the opposite of the other's),
and `explicit` first rewards distance from 1, fifteen times as strongly as it punishes it later. So unimportant
weights are deleted as well, and the n smallest masks hold weights that neither the facts nor anything else needs.
Towards w0, β is a price: to delete a share s of the candidates costs β · s nats. A weight that is whole moves only
where the facts gain more than that (an absolute value has no slope at 0, but no mask can rise above 1, so the slope
from below is taken there; else every weight would leave 1 at the least gradient, and all would be deleted a little).

Either way masks stay between 0 and 1, and a ladder cuts them: a weight that was learned at .9 is deleted all the same. With
`hard` the model runs with the masks cut at ½ while they are learned, and gradients pass the cut as if it were not there
(straight-through; Mallya et al. 2018, 1801.06519), so what is learned is what is deleted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import pandas as pd
import torch

from helpers.facts import Facts
from helpers.masks import Mask
from helpers.models import Model
from helpers.progress import progress
from helpers.provenance import text_hash
from helpers.splits import Split
from helpers.unlearning.finetune import build_terms, check_facts
from helpers.unlearning.objectives import Objective
from helpers.unlearning.objectives import objective as objective_of
from helpers.unlearning.texts import general_texts
from helpers.unlearning.training import Settings, TrainingError, gradients, prefixes
from helpers.unlearning.weights import MaskedWeights

CUT = 0.5  # below it a mask counts as a deletion
PARAMETRISATIONS, REGULARISERS = ("clamped", "explicit"), ("published", "towards")


@dataclass(frozen=True)
class Learning:
    """How masks are learned. `strength` is β; `hard`: see above (not published); `training` has the learning rate (cosine to
    0), steps, batch and weights of the terms; published are 50 steps, clip 1, a forget weight of 0.5 (edit) or 0.2 (unlearn).
    """

    parametrisation: str = "explicit"
    regulariser: str = "towards"
    strength: float = 1.5
    hard: bool = False
    warmup: int = 15
    momentum: float = 0.9
    decay: float = 0.01
    training: Settings = Settings(learning_rate=1.0, forget_weight=0.5)

    def __post_init__(self):
        for name, allowed in (("parametrisation", PARAMETRISATIONS), ("regulariser", REGULARISERS)):
            if getattr(self, name) not in allowed:
                given = getattr(self, name)
                raise TrainingError(f"weight masks: {name} {given!r}; allowed are {' and '.join(allowed)}")

    def coefficient(self, step: int) -> float:
        """β at a step, counted from 0."""
        if self.parametrisation == "clamped" or self.regulariser == "towards":
            return self.strength
        return min(self.strength * (step - self.warmup), self.strength)


@dataclass(frozen=True, eq=False)
class Learned:
    """Learned masks: parameter name → m in [0, 1] of the parameter's shape, 1 wherever no weight was a candidate."""

    values: dict[str, torch.Tensor] = field(repr=False)
    history: pd.DataFrame = field(repr=False)
    record: dict

    @property
    def importance(self) -> dict[str, torch.Tensor]:
        """1 − m, for `ladder`; weights whose m is 1 are never deleted."""
        return {name: torch.where(m < 1, 1 - m, -math.inf) for name, m in self.values.items()}


def learn(model: Model, split: Split, where: Mask, objective: str | Objective = "edit", learning: Learning = Learning(),
          texts: Sequence[str] | None = None, seed: int = 0, *, forget: Facts | None = None) -> Learned:
    """Train the masks of the candidates `where`; the model itself is the same before and after.

    The loss is that of fine-tuning (λ · forget + retain + text) plus the regulariser. One row of the history a step:
    losses, `regulariser`, `grad_norm` (before clipping), and after the step the `mean` of m and the shares that are `whole`
    (m = 1) and `deleted` (m below ½). A loss that is no finite number ends training with the masks as they are, and says so; at the first step it
    raises `TrainingError`.
    """
    objective, forget = objective_of(objective), split.forget if forget is None else forget
    check_facts(forget, split)
    texts = general_texts() if texts is None and "text" in objective.terms else list(texts or ())
    settings, explicit = learning.training, learning.parametrisation == "explicit"
    terms = build_terms(model, split, forget, objective, settings, texts, seed, where)
    rows, stopped = [], None
    with MaskedWeights(model, where) as trained:
        residuals = prefixes(model, trained.lowest, terms, settings)
        first = [w.clone() for w in trained.tensors]
        free = [torch.ones_like(w) if explicit else w.clone() for w in first]
        optimizer = torch.optim.SGD(free, lr=settings.learning_rate, momentum=learning.momentum)
        for step in progress(range(settings.steps), f"{learning.parametrisation} weight masks"):
            losses, settings = gradients(model, trained, partial(_clear, trained.tensors), terms, residuals, step, settings)
            for f, w, w0 in zip(free, trained.tensors, first):
                f.grad = w.grad * w0 if explicit else w.grad
            penalty = _regularise(free, first, learning, step)
            norm = torch.nn.utils.clip_grad_norm_(free, settings.clip or math.inf).item()
            bad = [name for name, value in {**losses, "gradient": norm}.items() if not math.isfinite(value)]
            if bad:
                stopped = f"{bad[0]} not finite at step {step}; the masks are those after {step} steps"
                if not rows:
                    raise TrainingError(f"weight masks: {bad[0]} not finite before the first step: nothing was learned")
                warnings.warn(f"training stopped: {stopped}", stacklevel=2)
                break
            optimizer.param_groups[0]["lr"] = settings.rate(step)
            _decay(free, first, learning)
            optimizer.step()
            with torch.no_grad():
                for f, w, w0 in zip(free, trained.tensors, first):
                    f.copy_(f.clamp(0, 1) if explicit else f.maximum(w0.clamp(max=0)).minimum(w0.clamp(min=0)))
                    w.copy_(w0 * (_mask_of(f, w0, explicit) >= CUT) if learning.hard else f * w0 if explicit else f)
            trained.write()
            masks = torch.cat([_mask_of(f, w0, explicit).flatten() for f, w0 in zip(free, first)])
            rows.append({"step": step, **losses, "regulariser": penalty, "grad_norm": norm, "mean": masks.mean().item(),
                         "whole": (masks == 1).float().mean().item(), "deleted": (masks < CUT).float().mean().item()})
        values = {}
        for name, f, w0 in zip(where.entries, free, first):
            part = where.entries[name]
            m = _mask_of(f, w0, explicit).cpu()
            full = torch.ones(where.shapes[name])
            values[name] = m.view(full.shape) if part is None else full.masked_scatter_(part, m)
    record = {"method": f"weight mask {learning.parametrisation} {'hard' if learning.hard else learning.regulariser}",
              "objective": {"name": objective.name, **asdict(objective)}, "learning": asdict(learning), "seed": seed,
              "split": split.record, "n_trained_on": len(forget), "candidates": where.digest,
              "texts": {"n": len(texts), "hash": text_hash("\0".join(texts))[:16]}, "stopped": stopped}
    return Learned(values, pd.DataFrame(rows), record)


def _mask_of(f: torch.Tensor, w0: torch.Tensor, explicit: bool) -> torch.Tensor:
    """m from what is trained; a weight that is 0 from the start stays as it is."""
    return f if explicit else torch.where(w0 == 0, 1.0, f / torch.where(w0 == 0, 1.0, w0))


def _regularise(free: Sequence[torch.Tensor], first: Sequence[torch.Tensor], learning: Learning, step: int) -> float:
    """Add the regulariser's gradient to that of the loss; its value."""
    explicit, published = learning.parametrisation == "explicit", learning.regulariser == "published"
    size = sum(f.numel() if explicit else w0.abs().sum().item() for f, w0 in zip(free, first))
    c, total = learning.coefficient(step) / size, 0.0
    for f, w0 in zip(free, first):
        whole = torch.ones_like(f) if explicit else w0
        distance = f if published and not explicit else f - whole
        f.grad = f.grad + c * (distance.sign() if published else -whole.sign())
        total += c * distance.abs().sum().item()
    return total


def _decay(free: Sequence[torch.Tensor], first: Sequence[torch.Tensor], learning: Learning) -> None:
    """Weight decay, after clipping as SGD has it: towards 0, or towards where training began."""
    for f, w0 in zip(free, first):
        origin = 0.0 if learning.regulariser == "published" else 1.0 if learning.parametrisation == "explicit" else w0
        f.grad = f.grad + learning.decay * (f - origin)


def _clear(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = torch.zeros_like(tensor)
