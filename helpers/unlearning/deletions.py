"""Deleting n single weights: by learned masks, by magnitude, or by saliency, at equal n.

    where = candidates(model, mask(model, ["mlp 1", "mlp 2", "mlp 3"]))     # without the gates, as published
    for chosen in ladder(model, magnitude(model, where), [1000, 3000, 10_000], "magnitude"):
        with delete(model, chosen).applied(model): ...
    ladder(model, by_saliency(model, split, where), ns, "saliency")
    ladder(model, learn(model, split, where).importance, ns, "learned")     # see helpers.unlearning.weight_masks

An importance maps parameter names to values: the larger, the earlier a weight is deleted; −inf never.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from helpers.facts import Facts
from helpers.localization.saliency import saliency
from helpers.masks import Mask, SelectionError, from_weights
from helpers.models import Model
from helpers.splits import Split
from helpers.unlearning.edit import Edit, select
from helpers.unlearning.finetune import questions


def candidates(model: Model, chosen: Mask, gate: bool = False) -> Mask:
    """The weights of a mask that may be deleted: those of the gates only if asked for (published: without)."""
    chosen.check(model)
    gated = chosen.layers if "gate" in model.roles and not gate else ()
    gates = {f"{model.path('gate', layer)}.weight" for layer in gated}
    whole = lambda name: torch.ones(chosen.shapes[name], dtype=torch.bool)
    kept = {name: part for name, part in chosen.entries.items() if name not in gates}
    entries = {name: whole(name) if part is None else part for name, part in kept.items()}
    return from_weights(model, entries, chosen.name)


def magnitude(model: Model, where: Mask) -> dict[str, torch.Tensor]:
    """−|w| of the candidates, for `ladder`: the smallest weights go first."""
    weights = {name: model.hf.get_parameter(name).detach().float().cpu() for name in where.entries}
    return _only(where, {name: -w.abs() for name, w in weights.items()})


def by_saliency(model: Model, split: Split, where: Mask, measure: str = "grad_weight", contrast: bool = False,
                format: str = "one_shot", *, forget: Facts | None = None) -> dict[str, torch.Tensor]:
    """Importance of the candidates for the facts to forget, for `ladder`: the most important go first.

    `measure` is one of `helpers.localization.saliency`: `grad_weight` (as SNIP and SalUn) or `fisher`. `contrast`
    divides it by the importance for as many facts to retain, plus its mean, since a weight that all facts need is
    salient for those to forget, too.
    """
    forget = split.forget if forget is None else forget
    of = lambda facts: saliency(model, questions(model, facts, split, format), ("mlp",), where).weights[measure]
    important = of(forget)
    if contrast:
        kept = of(split.retain_train[:len(forget)])
        mean = torch.cat([_only(where, kept)[name].flatten() for name in kept])
        mean = mean[mean.isfinite()].mean()
        important = {name: values / (kept[name] + mean) for name, values in important.items()}
    return _only(where, important)


def chance(where: Mask, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Importance drawn at random, for `ladder`: the control."""
    return _only(where, {name: torch.rand(where.shapes[name], generator=generator) for name in where.entries})


def available(importance: Mapping[str, torch.Tensor]) -> int:
    """How many weights may be deleted at most: of a learned mask, those that are not whole."""
    return sum(int((values > -math.inf).sum()) for values in importance.values())


def ladder(model: Model, importance: Mapping[str, torch.Tensor], ns: Sequence[int], name: str) -> list[Mask]:
    """For each n the mask of the n weights of largest importance; each holds those of smaller n.

    `importance`: parameter name → values, −inf for weights that are not to be deleted. Ties (learned masks have many
    at 0) are drawn in a fixed random order, not by position, which would prefer low layers. Raises `SelectionError`
    if there are too few.
    """
    flat, there = torch.cat([values.flatten() for values in importance.values()]), available(importance)
    if not ns or min(ns) < 1 or max(ns) > there:
        wanted = ", ".join(f"{n:,}" for n in ns) or "no"
        raise SelectionError(f"{name}: {wanted} weights are to be deleted; {there:,} may be, at least 1")
    drawn = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    order = drawn[flat[drawn].argsort(descending=True, stable=True)[:max(ns)]]
    masks = []
    for n in ns:
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[order[:n]] = True
        parts = chosen.split([values.numel() for values in importance.values()])
        entries = {path: part.view(values.shape) for (path, values), part in zip(importance.items(), parts)}
        masks.append(replace(from_weights(model, entries, f"{name} {n}"), budget=n))
    return masks


def delete(model: Model, chosen: Mask, record: Mapping | None = None) -> Edit:
    """The edit that sets the weights of a mask to zero. `record`: where the mask comes from, e.g. `learned.record`."""
    zeros = {name: torch.zeros(chosen.shapes[name]) for name in chosen.entries}
    return Edit.of(model, chosen, zeros, {"method": "weight mask", **(record or {}), "deleted": chosen.n_parameters})


def weights_of(model: Model, chosen: Mask) -> torch.Tensor:
    """(n,) the weights that a mask selects, float32 on the CPU: what `delete` would set to zero."""
    chosen.check(model)
    return torch.cat([select(model.hf.get_parameter(name).detach(), part).flatten().float().cpu() for name, part in chosen.entries.items()])


def _only(where: Mask, importance: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Importance of the candidates, −inf elsewhere."""
    limited = lambda values, part: values if part is None else torch.where(part, values, -math.inf)
    return {name: limited(importance[name], part) for name, part in where.entries.items()}
