"""Linear probes: at which layer can the answer be read from the residual stream?

One multinomial logistic regression per layer, all layers fitted at once (conjugate gradients on a
(layer, class, feature) weight tensor), on standardised features with an L2 penalty. The paper fits
scikit-learn's LogisticRegression per layer (spec sections 3.1 and 6.2); the objective is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch.nn import functional as F

from helpers.models import Model
from helpers.prompts import PromptSet

TOLERANCE = 5e-5  # of the mean gradient, half of what scikit-learn stops at
REFRESHED = frozenset((0, 4, 12, 30, 70, 150))  # steps that begin with a new preconditioner


@dataclass(frozen=True, eq=False)
class Probes:
    """Fitted probes: weight (layer, feature, class), bias (layer, class), and the training features' mean and scale."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    classes: tuple[str, ...]

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """(layer, n, class) from features (n, layer, feature)."""
        x = (features.float() - self.mean) / self.scale
        return torch.einsum("nlf,lfc->lnc", x, self.weight) + self.bias[:, None]

    def accuracy(self, features: torch.Tensor, labels: Sequence[str]) -> torch.Tensor:
        """(layer,) share of rows read as their label."""
        return (self.logits(features).argmax(-1) == encode(labels, self.classes)).float().mean(1)


def encode(labels: Sequence[str], classes: Sequence[str]) -> torch.Tensor:
    """(n,) class numbers; -1 for a label that is no class."""
    number = {c: i for i, c in enumerate(classes)}
    return torch.tensor([number.get(label, -1) for label in labels])


@torch.no_grad()
def fit(features: torch.Tensor, labels: Sequence[str], penalty: float = 1.0, max_iter: int = 300, tolerance: float = TOLERANCE) -> Probes:
    """Fit one probe a layer on features (n, layer, feature).

    Minimises, per layer, summed cross-entropy + penalty/2 · ‖W‖² (scikit-learn's C = 1/penalty, or 2/penalty for
    two classes, where it has one weight vector in place of our two), until no component of the gradient is above n · `tolerance`.
    Raises ValueError for fewer than two classes, a class with a single example, labels that do not match the rows, or a
    penalty that is not positive.
    """
    if len(labels) != len(features):
        raise ValueError(f"{len(features)} rows of features have {len(labels)} labels")
    classes = tuple(sorted(set(labels)))
    y = encode(labels, classes)
    if len(classes) < 2 or int(torch.bincount(y).min()) < 2:
        raise ValueError(f"a probe needs two classes or more with two examples or more each; got {dict(zip(classes, torch.bincount(y).tolist()))}")
    if not penalty > 0:
        raise ValueError(f"penalty {penalty}: it must be positive, or separable data have no best weights")
    x = features.float().permute(1, 2, 0).clone(memory_format=torch.contiguous_format)  # (layer, feature, n)
    mean = x.mean(-1, keepdim=True)
    x -= mean
    scale = (x.square().sum(-1, keepdim=True) / (len(y) - 1)).sqrt()
    # A feature that is constant up to rounding is no feature: dividing by its scale would blow the rounding up.
    scale = torch.where(scale > 1e-6 * mean.abs(), scale, torch.ones_like(scale))
    x /= scale
    target = F.one_hot(y).T.float()
    if x.shape[1] > len(y):  # the best weights lie in the span of the rows, where these have n coordinates
        span, x = torch.linalg.qr(x)
        weight, bias = _minimise(x, target, penalty, max_iter, tolerance)
        weight = weight @ span.mT
    else:
        weight, bias = _minimise(x, target, penalty, max_iter, tolerance)
    return Probes(weight.mT, bias, mean[..., 0], scale[..., 0], classes)


def _minimise(x: torch.Tensor, target: torch.Tensor, penalty: float, max_iter: int, tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (layer, class, feature) and biases (layer, class) from x (layer, feature, n) and one-hot labels (class, n).

    Preconditioned conjugate gradients (Polak–Ribière) with a line search; every layer goes its own way and stops when it is done.
    """
    x = F.pad(x, (0, 0, 0, 1), value=1.0)  # the last feature carries the bias and is not penalised
    n_layers, width, n = x.shape
    ridge = torch.full((width,), penalty).index_fill(0, torch.tensor(width - 1), 0.0)
    found = torch.zeros(n_layers, len(target), width)
    left, weight, logits = torch.arange(n_layers), found.clone(), torch.zeros(n_layers, len(target), n)
    direction, before, size_before, factor = found.clone(), found.clone(), torch.zeros(n_layers, 1, 1), torch.zeros(n_layers, 1, 1)
    for step in range(max_iter):
        p = logits.softmax(1)
        gradient = (p - target) @ x.mT + ridge * weight
        moving = gradient.abs().amax((1, 2)) > tolerance * n
        if 2 * int(moving.sum()) <= len(moving):  # what is done drops out
            found[left] = weight
            state = left, x, weight, logits, p, gradient, direction, before, size_before, factor
            left, x, weight, logits, p, gradient, direction, before, size_before, factor = (value[moving] for value in state)
            moving = moving[moving]
        if not len(left):
            break
        if step in REFRESHED:
            factor, size_before = _factor(x, p, ridge), torch.full((len(left), 1, 1), float("inf"))
        solved = torch.cholesky_solve(gradient.mT, factor).mT
        size = _dot(gradient, solved)
        direction = ((size - _dot(before, solved)) / size_before).clamp(min=0) * direction - solved
        direction *= moving[:, None, None]
        before, size_before = gradient, size
        change = direction @ x
        length = _length(logits, change, target, _dot(ridge * weight, direction), _dot(ridge * direction, direction))
        weight, logits = weight + length * direction, logits + length * change
    found[left] = weight
    return found[..., :-1], found[..., -1]


def _factor(x: torch.Tensor, p: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Cholesky factor (layer, feature, feature) of the Hessian, with one block for all classes: the mean of p (1 − p)."""
    curvature = (p * (1 - p)).sum(1, keepdim=True) / (p.shape[1] - 1)
    hessian = (x * curvature) @ x.mT
    size = hessian.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)
    return torch.linalg.cholesky(hessian + torch.diag_embed(ridge + 1e-6 * size))


def _length(logits: torch.Tensor, change: torch.Tensor, target: torch.Tensor, slope: torch.Tensor, curvature: torch.Tensor) -> torch.Tensor:
    """(layer, 1, 1) how far to go: Newton's method in one dimension, kept between lengths that are too short and too long.

    `slope` and `curvature` are those of the penalty.
    """
    length = torch.zeros_like(slope)
    low, high, steepest = length, torch.full_like(slope, float("inf")), None
    for _ in range(10):
        moved = (logits + length * change).softmax(1) * change
        first = (moved - target * change).sum((1, 2), keepdim=True) + slope + length * curvature
        steepest = first.abs() if steepest is None else steepest
        if (first.abs() <= 0.1 * steepest).all():
            break
        second = _dot(moved, change) - moved.sum(1, keepdim=True).square().sum(2, keepdim=True) + curvature
        low, high = torch.where(first < 0, length, low), torch.where(first < 0, high, length)
        newton = length - first / second.clamp(min=1e-30)
        between = torch.where(high.isinf(), 2 * low + 1, (low + high) / 2)
        length = torch.where((low < newton) & (newton < high), newton, between)
    return length


def _dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(layer, 1, 1)"""
    return (one * other).sum((1, 2), keepdim=True)


def cross_validate(features: torch.Tensor, labels: Sequence[str], folds: int = 5, seed: int = 0, shuffled: bool = False,
                   penalty: float = 1.0) -> pd.DataFrame:
    """Accuracy on held-out rows by layer: columns ``layer``, ``fold``, ``accuracy``, ``chance`` (majority class).

    With one row a subject, folds are disjoint in subjects. They are stratified: every label is spread over
    all of them. ``shuffled`` permutes the labels first: the control that a probe must fail (selectivity).
    Layer 0 is the first layer of ``features``. Raises ValueError as `fit` does.
    """
    if not 2 <= folds <= len(labels):
        raise ValueError(f"{len(labels)} rows cannot be cut into {folds} folds")
    generator = torch.Generator().manual_seed(seed)
    labels = list(labels)
    if shuffled:
        labels = [labels[i] for i in torch.randperm(len(labels), generator=generator).tolist()]
    fold_of = torch.empty(len(labels), dtype=torch.long)
    # Sorting a random order by label, stably, leaves the order random within each label.
    order = sorted(torch.randperm(len(labels), generator=generator).tolist(), key=lambda i: labels[i])
    fold_of[order] = torch.arange(len(labels)) % folds
    rows = []
    for fold in range(folds):
        train, test = (fold_of != fold).nonzero().flatten(), (fold_of == fold).nonzero().flatten()
        probes = fit(features[train], [labels[i] for i in train.tolist()], penalty)
        held = [labels[i] for i in test.tolist()]
        chance = max(held.count(c) for c in set(held)) / len(held)
        rows += [{"layer": l, "fold": fold, "accuracy": a, "chance": chance} for l, a in enumerate(probes.accuracy(features[test], held).tolist())]
    return pd.DataFrame(rows)


def residuals(model: Model, prompts: PromptSet, positions: str = "last", batch_size: int = 64) -> torch.Tensor:
    """(n, layer, d_model) residual stream at one position a prompt: index 0 the embeddings, index l + 1 after block l."""
    from helpers import tracing  # which needs nnsight; fitting does not

    sites = [("embed", 0), *(("resid_post", l) for l in range(model.n_layers))]
    trace = tracing.read(model, prompts, sites, positions=positions, batch_size=batch_size)
    return torch.stack([trace[site].float().cpu() for site in sites], dim=1)


def arrival(accuracy: Sequence[float], chance: float, share: float = 0.9) -> int:
    """L: the first layer at which (accuracy − chance) reaches ``share`` of its maximum over layers.

    Raises ValueError if no layer is above chance: nothing has arrived anywhere.
    """
    above = [a - chance for a in accuracy]
    if not above or not max(above) > 0:
        raise ValueError(f"no layer is read above chance ({chance:.3f}): {[round(a, 3) for a in accuracy]}")
    return next(l for l, a in enumerate(above) if a >= share * max(above))
