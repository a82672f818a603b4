"""Handling the weights: what brings a fact back without training, or would anyway before the model is shipped.

    quantise      round trip through int8, int4 or NF4: small edits may be rounded away
    prune         the smallest weights of each matrix set to 0
    noise         Gaussian noise, in shares of each matrix' own spread
    undo          the top singular directions of the change taken back (needs the original weights)
    interpolate   on the line from the original to the edited weights, and beyond (likewise)

Each takes the options of `rows.untouched` that say what is read: `formats`, `orders`, `n_retain`, `batch_size`.
All but `undo` and `interpolate`, which change what the edit changed, treat every matrix of the blocks; embeddings, norms and
biases stay, as in common quantisers. The model ends with the weights that it had.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from scipy.stats import norm

from helpers.attacks.rows import AttackError, applied, asked_of, check_trainable, read, tidy
from helpers.masks import Mask, from_weights
from helpers.models import Model
from helpers.progress import progress
from helpers.prompts import LATIN_SQUARE
from helpers.selection import everything
from helpers.splits import Split
from helpers.unlearning.edit import Edit

Change = Callable[[str, torch.Tensor], torch.Tensor]  # name and weights of a matrix → new weights
GROUP = {"int8": None, "int4": 128, "nf4": 64}  # weights along a row that share a scale; None: the whole row


def quantise(model: Model, edit: Edit | None, split: Split, *, kinds: Sequence[str] = tuple(GROUP), seed: int = 0,
             **reading) -> pd.DataFrame:
    """Attack `quantise`, one setting a number format: weights rounded to it and back. Further column: `kind`."""
    changes = [(kind, {"kind": kind}, lambda name, w, kind=kind: round_trip(w, kind)) for kind in kinds]
    return _attack(model, edit, split, "quantise", changes, **reading)


def prune(model: Model, edit: Edit | None, split: Split, *, shares: Sequence[float] = (0.1, 0.3, 0.5), seed: int = 0,
          **reading) -> pd.DataFrame:
    """Attack `prune`: that share of the smallest weights of each matrix is 0. Further column: `share`."""
    changes = [(f"{share:.0%}", {"share": share}, lambda name, w, share=share: smallest_dropped(w, share)) for share in shares]
    return _attack(model, edit, split, "prune", changes, **reading)


def noise(model: Model, edit: Edit | None, split: Split, *, levels: Sequence[float] = (0.05, 0.1, 0.2), draws: int = 1,
          seed: int = 0, **reading) -> pd.DataFrame:
    """Attack `noise`: level × standard deviation of each matrix, drawn `draws` times. Further columns: `level`, `draw`."""

    def noisy(level: float, draw: int) -> Change:
        def change(name: str, w: torch.Tensor) -> torch.Tensor:
            generator = torch.Generator().manual_seed(random.Random(f"{seed}-{draw}-{name}").randrange(2**62))
            return w + level * w.std() * torch.randn(w.shape, generator=generator).to(w.device)
        return change

    changes = [(f"{level:g} σ, draw {draw}", {"level": level, "draw": draw}, noisy(level, draw))
               for level in levels for draw in range(draws)]
    return _attack(model, edit, split, "noise", changes, **reading)


def undo(model: Model, edit: Edit, split: Split, *, ranks: Sequence[int | None] = (1, 2, 4, 8, None), seed: int = 0,
         **reading) -> pd.DataFrame:
    """Attack `undo`: of every matrix' change, the top `rank` singular directions are taken back; None or full rank restores it.

    An edit that hides a fact behind a few directions is undone early. Of a partly masked matrix, the rest changes a
    little too, until all is restored. Further column: `rank`, missing for None.
    """
    original = _original(model, edit, "undo")
    parts = {}

    def without(rank: int | None) -> Change:
        def change(name: str, w: torch.Tensor) -> torch.Tensor:
            old = original[name].to(w.device)
            if rank is None or rank >= min(w.shape):
                return old
            if name not in parts:
                parts[name] = torch.linalg.svd(w - old.float(), full_matrices=False)
            u, s, v = parts[name]
            return w - (u[:, :rank] * s[:rank]) @ v[:rank]
        return change

    named = {rank: ("all directions", float("nan")) if rank is None else (f"rank {rank}", rank) for rank in ranks}
    changes = [(setting, {"rank": number}, without(rank)) for rank, (setting, number) in named.items()]
    return _attack(model, edit, split, "undo", changes, _whole(model, edit), **reading)


def interpolate(model: Model, edit: Edit, split: Split, *, amounts: Sequence[float] = (0, 0.25, 0.5, 0.75, 1), seed: int = 0,
                **reading) -> pd.DataFrame:
    """Attack `interpolate`: original + amount × change; 0 and 1 are the two models, bit for bit. Further column: `amount`."""
    original = _original(model, edit, "interpolate")

    def between(amount: float) -> Change:
        def change(name: str, w: torch.Tensor) -> torch.Tensor:
            old = original[name].to(w.device)
            return {0: old, 1: w}.get(amount, old + amount * (w - old))
        return change

    changes = [(f"{amount:g}", {"amount": amount}, between(amount)) for amount in amounts]
    return _attack(model, edit, split, "interpolate", changes, _whole(model, edit), **reading)


def round_trip(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Weights (out, in) through a number format and back, fp32.

    int8 has one scale a row, int4 one for 128 weights of a row, both symmetric: the largest weight is 127 (7) steps, and no
    weight moves by more than half a step. NF4 (Dettmers et al. 2023, 2305.14314) has 64 weights a scale and
    16 levels, the quantiles of a normal distribution: no weight moves by more than .152 of the largest.
    """
    if kind not in GROUP:
        raise AttackError(f"quantisation to {kind!r}; there are {', '.join(GROUP)}")
    weight = weight.float()
    columns = weight.shape[1]
    group = min(GROUP[kind] or columns, columns)
    padded = torch.nn.functional.pad(weight, (0, -columns % group)).unflatten(1, (-1, group))
    largest = padded.abs().amax(-1, keepdim=True)
    if kind == "nf4":
        levels = nf4_levels().to(weight.device)
        scaled = padded / largest.clamp(min=torch.finfo(torch.float32).tiny)
        rounded = levels[torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2)] * largest
    else:
        step = largest / {"int8": 127, "int4": 7}[kind]
        rounded = (padded / step.clamp(min=torch.finfo(torch.float32).tiny)).round() * step
    return rounded.flatten(1)[:, :columns]


def nf4_levels() -> torch.Tensor:
    """The 16 levels of NF4: eight quantiles of the normal distribution up to 1, seven down to −1, and 0."""
    tail = 0.9677083  # so that the outermost quantile is that of the middle of its bin, as published
    above = norm.ppf(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    below = -norm.ppf(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.tensor(sorted([*above, 0.0, *below]))
    return (levels / levels.max()).float()


def smallest_dropped(weight: torch.Tensor, share: float) -> torch.Tensor:
    """The weights with the smallest share of them, by magnitude, set to 0."""
    if not 0 <= share <= 1:
        raise AttackError(f"pruning: share {share}; it is from 0 to 1")
    dropped = weight.abs().flatten().argsort(stable=True)[:round(share * weight.numel())]
    return weight.flatten().index_fill(0, dropped, 0.0).view(weight.shape)


def _attack(model: Model, edit: Edit | None, split: Split, attack: str, changes: Sequence[tuple[str, dict, Change]],
            mask: Mask | None = None, *, formats: Sequence[str] = ("one_shot", "mcq"), orders: Sequence[int] = LATIN_SQUARE,
            n_retain: int = 100, n_forget: int | None = None, batch_size: int = 256) -> pd.DataFrame:
    check_trainable(model, attack)
    groups, tables = asked_of(split, n_retain, n_forget), []
    with applied(model, edit):
        for setting, extra, change in progress(changes, attack, len(changes)):
            with changed(model, mask or everything(model), change, attack):
                table = read(model, split, groups, formats, orders, batch_size)
            parts = table.groupby("format", sort=False)
            tables += [tidy(part, attack, f"{setting}, {format}", **extra) for format, part in parts]
    return pd.concat(tables, ignore_index=True)


def changed(model: Model, mask: Mask, change: Change, name: str):
    """A context in which the masked matrices are as `change` makes them, from their fp32 values."""
    named = dict(model.hf.named_parameters())
    new = {entry: change(entry, named[entry].detach().float()) for entry in mask.entries}
    return Edit.of(model, mask, new, {"method": name}).applied(model)


def _original(model: Model, edit: Edit | None, attack: str) -> dict[str, torch.Tensor]:
    if edit is None:
        raise AttackError(f"{attack}: compares the edited with the original weights; it needs an edit")
    return {name: model.hf.get_parameter(name).detach().clone() for name in edit.values}


def _whole(model: Model, edit: Edit) -> Mask:
    """All weights of every matrix that the edit touches."""
    entries = {name: torch.ones(model.hf.get_parameter(name).shape, dtype=torch.bool) for name in edit.values}
    return from_weights(model, entries, "edited matrices")
