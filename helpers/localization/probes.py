"""Linear probes: at which layer can the answer be read from the residual stream?

One multinomial logistic regression per layer, all layers fitted at once (a batched L-BFGS over a
(layer, feature, class) weight tensor), on standardised features with an L2 penalty. The paper fits
scikit-learn's LogisticRegression per layer (spec sections 3.1 and 6.2); the objective is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch.nn import functional as F

from helpers import tracing
from helpers.models import Model
from helpers.prompts import PromptSet


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


def fit(features: torch.Tensor, labels: Sequence[str], penalty: float = 1.0, max_iter: int = 300) -> Probes:
    """Fit one probe a layer on features (n, layer, feature).

    Minimises, per layer, summed cross-entropy + penalty/2 · ‖W‖² (scikit-learn's C = 1/penalty, or 2/penalty for
    two classes, where it has one weight vector in place of our two). On hard data 100 iterations are too few and
    leave a test row or two misread.
    Raises ValueError for fewer than two classes, a class with a single example, or labels that do not
    match the rows.
    """
    if len(labels) != len(features):
        raise ValueError(f"{len(features)} rows of features have {len(labels)} labels")
    classes = tuple(sorted(set(labels)))
    y = encode(labels, classes)
    if len(classes) < 2 or int(torch.bincount(y).min()) < 2:
        raise ValueError(f"a probe needs two classes or more with two examples or more each; got {dict(zip(classes, torch.bincount(y).tolist()))}")
    x = features.float()
    mean, scale = x.mean(0), x.std(0)
    # A feature that is constant up to rounding is no feature: dividing by its scale would blow the rounding up.
    scale = torch.where(scale > 1e-6 * x.abs().amax(0), scale, torch.ones_like(scale))
    x = ((x - mean) / scale).transpose(0, 1)  # (layer, n, feature)
    weight = torch.zeros(x.shape[0], x.shape[2], len(classes), requires_grad=True)
    bias = torch.zeros(x.shape[0], len(classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iter, history_size=20, line_search_fn="strong_wolfe",
                                  tolerance_grad=3e-3, tolerance_change=1e-9)

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        # Summed in double precision: over many layers and rows the line search could not see small gains in single.
        logits = (torch.bmm(x, weight) + bias[:, None]).double()
        # The layers' objectives do not interact: their sum has its minimum where each has its own.
        loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="sum")
        loss = loss + penalty / 2 * weight.double().square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return Probes(weight.detach(), bias.detach(), mean, scale, classes)


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
