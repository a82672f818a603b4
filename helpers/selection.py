"""Which components to edit: scores and a budget of weights, and the controls a choice must beat.

    flu = mask(model, ["mlp 2", "mlp 3"])                     # a choice by hand, or by a localization
    scores = whole_units(component_scores(table))             # see helpers.localization.evidence
    rival = greedy(model, scores, flu.n_parameters)           # as many weights as `flu`, by |score|
    rival.n_parameters, rival.overshoot                       # whole units: the budget is exceeded a little
    random_units(model, flu.n_parameters, seed=0), windows(model, 2), everything(model)
    preset(load_model("google/gemma-7b"), "gemma-7b", "sports", "flu")

Every function returns a `Mask` (see `helpers.masks`, where units and counting are explained).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch

from helpers.masks import MATRICES, Mask, SelectionError, from_weights, mask, matrices, parse, size
from helpers.models import Model

# model -> layers, d_model, d_mlp
SHAPES = {"gemma-7b": (28, 3072, 24576), "gemma-2-9b": (42, 3584, 14336), "llama-3-8b": (32, 4096, 14336)}
# What the paper trained (spec section 3.3, from its logs): A attention blocks, M MLPs. FLU is fact lookup, AP
# attribution patching, CT causal tracing. Sports choices serve all athlete and full-sport tasks.
PUBLISHED = {
    "gemma-7b sports flu": "M 2-7",
    "gemma-7b sports ap": "A 18,20,22,25,27 M 21,23,25-27",
    "gemma-7b sports ap-mlps": "M 21-23,25-27",
    "gemma-7b sports ct": "A 6,12,13,17,20,21,25 M 21-23,25,27",
    "gemma-7b sports ct-mlps": "M 21-23,25-27",
    "gemma-2-9b sports flu": "M 2-6",
    "gemma-2-9b sports ap": "A 25,33 M 28,31,33,35,41",
    "gemma-2-9b sports ap-mlps": "M 28,31,33,35,41",
    "gemma-2-9b sports ct": "A 3,4,8,10,12,14,19,23,24,26,28,34-39,41",
    "gemma-2-9b sports ct-mlps": "M 3-5,7,8",
    "llama-3-8b sports flu": "M 1-4",
    "llama-3-8b sports ap": "A 15,21,31 M 21,22,30,31",
    "llama-3-8b sports ap-mlps": "M 21,22,30,31",
    "llama-3-8b sports ct": "A 1,3,7,10,12,14,16,18,19,22,24,26-31",
    "llama-3-8b sports ct-mlps": "M 5-7,29",
    "gemma-7b counterfact-16 flu": "M 1,3,4,6,9,17-19",
    "gemma-7b counterfact-16 ap": "A 2,20,24-27 M 20-25,27",
    "gemma-7b counterfact-16 ap-mlps": "M 14,20-25,27",
    "gemma-7b counterfact-16 ct": "A 0-2,4-9,11,13-27 M 13,21,23",
    "gemma-7b counterfact-16 ct-mlps": "M 1,11,13,14,20,21,23,25",
    "gemma-7b counterfact-64 flu": "M 1,3,4,6,12",
    "gemma-7b counterfact-64 ap": "A 20,24-27 M 0,22,23,27",
    "gemma-7b counterfact-64 ap-mlps": "M 0,22-24,27",
    "gemma-7b counterfact-64 ct": "A 1-6,9-16,18-26",
    "gemma-7b counterfact-64 ct-mlps": "M 20-23,25",
    "gemma-2-9b counterfact-16 flu": "M 3,4,7-9",
    "gemma-2-9b counterfact-16 ap": "A 2,25,29 M 4,9,32,33,38",
    "gemma-2-9b counterfact-16 ap-mlps": "M 4,9,32,33,38",
    "gemma-2-9b counterfact-16 ct": "A 0,5,6,11-14,16,20,22,23,27,30,33,38-41",
    "gemma-2-9b counterfact-16 ct-mlps": "M 13,22,23,26,41",
    "gemma-2-9b counterfact-64 flu": "M 3-5,7-10,17",
    "gemma-2-9b counterfact-64 ap": "A 20,25,26,29 M 30,32-35,37,38",
    "gemma-2-9b counterfact-64 ap-mlps": "M 30,32-35,37,38,41",
    "gemma-2-9b counterfact-64 ct": "A 0,1,3,5,6,9-18,20,23,24,26-28,31-33,36,38,39,41",
    "gemma-2-9b counterfact-64 ct-mlps": "M 2,4,5,7-9,13,39",
    "llama-3-8b counterfact-16 flu": "M 5,6,9,13",
    "llama-3-8b counterfact-16 ap": "A 1,3,13,17,24,31 M 10,21,24",
    "llama-3-8b counterfact-16 ap-mlps": "M 10,21,24,30",
    "llama-3-8b counterfact-16 ct": "A 1,2,4,6,7,11,12,16,18,19,21-23,25,27-29",
    "llama-3-8b counterfact-16 ct-mlps": "M 0,4,9,26",
    "llama-3-8b counterfact-64 flu": "M 4-7",
    "llama-3-8b counterfact-64 ap": "A 1,13,17,24,31 M 21,22,31",
    "llama-3-8b counterfact-64 ap-mlps": "M 11,21,22,31",
    "llama-3-8b counterfact-64 ct": "A 2,4,5,8,14,16,17,19,20,23,26-28 M 20",
    "llama-3-8b counterfact-64 ct-mlps": "M 15,16,20,21",
}


def whole_units(scores: pd.Series, combine: str = "absolute") -> pd.Series:
    """Scores of attention blocks and MLPs from scores of heads and MLPs, both by name (`evidence.component_scores`).

    `combine="absolute"` adds the heads' absolute values; `"signed"` takes the absolute value of their sum,
    as the paper's code does, where opposite heads cancel.
    """
    if combine not in ("absolute", "signed"):
        raise SelectionError(f"combine={combine!r}: allowed are absolute and signed")
    parts = defaultdict(list)
    for name, score in scores.items():
        unit = parse(name)
        if unit.kind == "head" and f"attn {unit.layer}" in scores:
            raise SelectionError(f"layer {unit.layer} has scores of its attention and of its heads: leave one out")
        parts[f"attn {unit.layer}" if unit.kind == "head" else name].append(score)
    join = {"absolute": lambda values: sum(map(abs, values)), "signed": lambda values: abs(sum(values))}[combine]
    joined = {name: join(values) if name.startswith("attn") else values[0] for name, values in parts.items()}
    return pd.Series(joined, name=scores.name)


def greedy(model: Model, scores: pd.Series | Mapping[str, float], budget: int, kinds: Sequence[str] = ("attn", "mlp"),
           name: str = "") -> Mask:
    """Units by falling |score| until their weights reach the budget; the last one may exceed it (the paper's rule).

    `scores` by unit name; `kinds` says which units may be taken: `("mlp",)` is the MLP-only variant. Equal scores
    go by the order given. Raises `SelectionError` for a budget that all these units together do not reach.
    """
    scores = pd.Series(dict(scores), dtype=float)
    scores = scores[[parse(unit).kind in kinds for unit in scores.index]]
    if scores.isna().any():
        raise SelectionError(f"no score (NaN) for {', '.join(scores.index[scores.isna()])}")
    order = scores.abs().sort_values(ascending=False, kind="stable").index
    return _fill(model, order, budget, name or f"top {' + '.join(kinds)}")


def top_weights(model: Model, importance: Mapping[str, torch.Tensor], n: int, name: str = "top weights") -> Mask:
    """The n single weights of largest importance, by parameter name as `saliency` keeps it; ties by position."""
    flat = torch.cat([values.flatten() for values in importance.values()]) if importance else torch.zeros(0)
    if not 0 < n <= len(flat):
        raise SelectionError(f"{name}: {n:,} weights are to be chosen out of {len(flat):,}")
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:n]] = True
    parts = chosen.split([values.numel() for values in importance.values()])
    entries = {path: part.view(values.shape) for (path, values), part in zip(importance.items(), parts)}
    return replace(from_weights(model, entries, name), budget=n)


def random_units(model: Model, budget: int, seed: int, kinds: Sequence[str] = MATRICES, name: str = "") -> Mask:
    """Single matrices drawn uniformly, without replacement, until the budget is reached.

    Over all seven kinds; the paper's control leaves out `gate`, about a quarter of the weights.
    """
    drawn = [unit for unit in matrices(model) if unit.kind in kinds]
    order = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(seed))
    return _fill(model, [str(drawn[i]) for i in order], budget, name or f"random {seed}")


def random_mlps(model: Model, count: int, seed: int) -> Mask:
    """`count` whole MLPs drawn uniformly."""
    _check_count(model, count)
    layers = torch.randperm(model.n_layers, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return mask(model, [f"mlp {layer}" for layer in layers.tolist()], f"random MLPs {seed}")


def all_mlps(model: Model) -> Mask:
    return mask(model, model.components("mlp"), "all MLPs")


def everything(model: Model) -> Mask:
    """Every counted weight: the paper's "nonlocalized"."""
    return mask(model, [*model.components("attn"), *model.components("mlp")], "everything")


def windows(model: Model, count: int) -> list[Mask]:
    """All runs of `count` neighbouring MLPs, one for every start layer: the control for depth.

    A method that picks `count` MLPs is compared with windows of the same number of weights at every depth.
    """
    _check_count(model, count)
    starts = range(model.n_layers - count + 1)
    return [mask(model, [f"mlp {layer}" for layer in range(s, s + count)], f"MLP {s}-{s + count - 1}") for s in starts]


def preset(model: Model, published: str, task: str, method: str) -> Mask:
    """A published choice of layers, e.g. `preset(model, "gemma-7b", "sports", "flu")`; see `PUBLISHED`.

    Raises `SelectionError` for a choice that was not published and for a model of another shape.
    """
    if published not in SHAPES:
        raise SelectionError(f"no published choices for {published!r}; there are {', '.join(SHAPES)}")
    choices = {tuple(key.split()[1:]): layers for key, layers in PUBLISHED.items() if key.startswith(published)}
    if (task, method) not in choices:
        raise SelectionError(f"{published}: no choice {task} {method}; there are {', '.join(map(' '.join, choices))}")
    shape = model.n_layers, model.d_model, model.d_mlp
    if shape != SHAPES[published]:
        raise SelectionError(
            f"{model.name} is no {published}: layers, d_model, d_mlp are {shape}, not {SHAPES[published]}"
        )
    units, kind = [], ""
    for word in choices[task, method].replace(",", " ").split():
        kind = {"A": "attn", "M": "mlp"}.get(word, kind)
        first, _, last = word.partition("-")
        if first.isdigit():
            units += [f"{kind} {layer}" for layer in range(int(first), int(last or first) + 1)]
    return mask(model, units, f"{published} {task} {method}")


def _fill(model: Model, order: Iterable[str], budget: int, name: str) -> Mask:
    order, chosen, total = list(order), [], 0
    if budget <= 0:
        raise SelectionError(f"{name}: a budget of {budget} weights selects nothing")
    while total < budget:
        if len(chosen) == len(order):
            raise SelectionError(
                f"{name}: the budget of {budget:,} weights is larger than all {len(order)} units it may take, {total:,}"
            )
        chosen.append(order[len(chosen)])
        total = size(model, chosen)
    return replace(mask(model, chosen, name), budget=budget)


def _check_count(model: Model, count: int) -> None:
    if not 1 <= count <= model.n_layers:
        raise SelectionError(f"{count} MLPs: {model.name} has {model.n_layers}")
