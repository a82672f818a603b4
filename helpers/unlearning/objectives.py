"""What training asks of the facts to forget: one small class an objective.

Each `loss(logits, targets)` maps the logits at the answer position (b, vocab) to one loss a row (b,), where
p = p(true answer | prompt), its first token. A training step minimises

    weight · mean forget loss  +  retain cross-entropy  +  text cross-entropy

over the objective's `terms`. All but plain gradient ascent have the same retain and text terms, so that
methods differ in the forget loss alone; pass `terms=("forget", "retain")` for another choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

TERMS = ("forget", "retain", "text")


@dataclass(frozen=True)
class Targets:
    """Answers of n prompts: first tokens of the true and the edit answer, and the unedited model's log p(true) or None."""

    true: torch.Tensor
    edit: torch.Tensor
    reference: torch.Tensor | None = None

    def __getitem__(self, rows: torch.Tensor) -> Targets:
        return Targets(*(None if value is None else value[rows] for value in (self.true, self.edit, self.reference)))

    def to(self, device) -> Targets:
        return Targets(*(None if value is None else value.to(device) for value in (self.true, self.edit, self.reference)))


def log_p(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(b,) log-probability of one token a row."""
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


@dataclass(frozen=True)
class Objective:
    """Base of all objectives. `terms` says which of forget, retain and text are trained on."""

    terms: tuple[str, ...] = TERMS
    name: ClassVar[str] = ""
    needs_reference: ClassVar[bool] = False

    def loss(self, logits: torch.Tensor, targets: Targets) -> torch.Tensor:
        """What is minimised on forget prompts, from the last position's logits (b, vocabulary). RMU acts on hidden states and has none."""
        raise NotImplementedError(f"{type(self).__name__} has no loss on logits")


@dataclass(frozen=True)
class EditAnswer(Objective):
    """−log p(edit answer): the paper's editing loss (spec section 4.1)."""

    name: ClassVar[str] = "edit"

    def loss(self, logits, targets):
        return -log_p(logits, targets.edit)


@dataclass(frozen=True)
class Relearn(Objective):
    """−log p: ordinary training on the true answer, as attacks do, and the retain term of every objective."""

    name: ClassVar[str] = "relearn"

    def loss(self, logits, targets):
        return -log_p(logits, targets.true)


@dataclass(frozen=True)
class Unlearn(Objective):
    """−log(1 − p), and 0 where log p < cutoff: the paper's unlearning loss, after HarmBench (Mazeika et al. 2024, 2402.04249).

    Rows that are cut off still count in the mean, as there.
    """

    cutoff: float = -5.0
    name: ClassVar[str] = "unlearn"

    def loss(self, logits, targets):
        # log(1 − p) from the other logits, because 1 − p itself is 0 in floating point where the model is certain
        others = logits.scatter(1, targets.true[:, None], float("-inf"))
        loss = logits.logsumexp(-1) - others.logsumexp(-1)
        return torch.where(log_p(logits, targets.true) < self.cutoff, 0.0, loss)


@dataclass(frozen=True)
class GradientAscent(Objective):
    """log p, on the forget set alone (Jang et al. 2023, 2210.01504). Without a bound and without a brake: it wrecks models."""

    terms: tuple[str, ...] = ("forget",)
    name: ClassVar[str] = "ascent"

    def loss(self, logits, targets):
        return log_p(logits, targets.true)


@dataclass(frozen=True)
class GradDiff(GradientAscent):
    """log p on the forget set, cross-entropy on what is kept (Liu et al. 2022, 2203.12817)."""

    terms: tuple[str, ...] = TERMS
    name: ClassVar[str] = "graddiff"


@dataclass(frozen=True)
class NPO(Objective):
    """−(2/β) log σ(−β log(p / p_base)) (Zhang et al. 2024, 2404.05868).

    Gradient ascent with a brake: its gradient is that of log p times 2 p^β / (p^β + p_base^β), which is 1 at
    the start, or everywhere as β → 0, and vanishes as p falls.
    """

    beta: float = 0.1
    name: ClassVar[str] = "npo"
    needs_reference: ClassVar[bool] = True

    def loss(self, logits, targets):
        ratio = log_p(logits, targets.true) - targets.reference
        return -2 / self.beta * F.logsigmoid(-self.beta * ratio)


@dataclass(frozen=True)
class SimNPO(Objective):
    """−(2/β) log σ(−(β/|y|) log p − γ) (Fan et al. 2024, 2410.07163): NPO without the reference. |y| = 1 token here."""

    beta: float = 2.5
    gamma: float = 0.0
    name: ClassVar[str] = "simnpo"

    def loss(self, logits, targets):
        return -2 / self.beta * F.logsigmoid(-self.beta * log_p(logits, targets.true) - self.gamma)


@dataclass(frozen=True)
class RMU(Objective):
    """Representation misdirection (Li et al. 2024, WMDP, 2403.03218): on the residual h after `layer`, over real tokens,

        forget  ‖h − c·u‖² / d          u a fixed random direction of length 1
        keep    α ‖h − h_base‖² / d     on retain prompts and on texts, in place of their cross-entropies

    c is `coefficient`, or by default `scale`·‖h_base‖ for each token (adaptive RMU, Huu-Tien et al. 2024,
    2408.06223), since a fixed number fits one model at one layer. `layer` None is the highest masked layer,
    as published. Blocks above it are not run at all. Of forget prompts only what tells them apart is steered.
    """

    layer: int | None = None
    coefficient: float | None = None
    scale: float = 5.0
    alpha: float = 100.0
    name: ClassVar[str] = "rmu"

    def direction(self, d_model: int, seed: int) -> torch.Tensor:
        """(d_model,) of length 1; uniform in [0, 1) before it is scaled, as in the reference code."""
        u = torch.rand(d_model, generator=torch.Generator().manual_seed(seed))
        return u / u.norm()

    def forget(self, hidden: torch.Tensor, base: torch.Tensor, mask: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """(b,) from hidden states now and in the unedited model (b, length, d_model)."""
        size = self.coefficient if self.coefficient is not None else self.scale * base.norm(dim=-1, keepdim=True)
        return _mean_square(hidden - size * u, mask)

    def keep(self, hidden: torch.Tensor, base: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.alpha * _mean_square(hidden - base, mask)


def _mean_square(difference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(b,) mean over the real tokens and features of each row."""
    each = difference.float().square().mean(-1) * mask
    return each.sum(1) / mask.sum(1)


OBJECTIVES = {kind.name: kind for kind in (EditAnswer, Unlearn, GradientAscent, GradDiff, NPO, SimNPO, RMU, Relearn)}


def objective(name: str | Objective, **options) -> Objective:
    """The objective of this name, e.g. `objective("npo", beta=0.5)`. Raises ValueError for another name."""
    if isinstance(name, Objective):
        return name
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](**options)
