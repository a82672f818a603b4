"""Edits in sequence: the facts in slices, one after the other, in one model that carries all edits made before.

    def localize(model, facts, number):           # called for each slice, on the model as edited so far
        return greedy(model, scores_of(model, facts), budget)

    done = sequential(model, split, localize)     # 4 slices × 16 facts of first-64, 25 steps each
    done.rows                                     # every format, after every slice, with the slice of each fact
    with done.edit.applied(model): ...            # all slices together, as one ordinary edit

As published (spec section 1.3), every slice has its own localization, a fresh optimizer and schedule; the retain set
leaves out the facts of all slices, and all facts are asked again at the end, here after each slice. Longer sequences:
a split with more facts to forget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import pandas as pd
import torch

from helpers.facts import Facts
from helpers.masks import Mask, from_weights
from helpers.models import Model
from helpers.progress import progress
from helpers.splits import Split
from helpers.unlearning.edit import Edit, EditError
from helpers.unlearning.evaluation import evaluate, summarize
from helpers.unlearning.finetune import check_facts, finetune
from helpers.unlearning.objectives import Objective
from helpers.unlearning.training import Settings

# model as edited so far, facts of the slice, its number → where to edit
Localize = Callable[[Model, Facts, int], Mask]


@dataclass(frozen=True)
class Slice:
    """What an editing method gets: the facts to edit now, those edited before, and where."""

    number: int
    facts: Facts
    earlier: Facts
    mask: Mask
    seed: int


# the model as edited so far, the whole split, the slice → its edit
Method = Callable[[Model, Split, Slice], Edit]


@dataclass(frozen=True, eq=False)
class Sequential:
    """`edit`: all slices together. `edits`, `slices`: one a slice; an edit belongs on top of those before it.

    `rows`: those of `evaluate` after 0, 1, 2 … slices (`after`), with the slice of each fact (`slice`, from 0; none
    outside the forget set).
    """

    edit: Edit
    edits: tuple[Edit, ...]
    slices: tuple[Slice, ...]
    rows: pd.DataFrame = field(repr=False)

    def table(self) -> pd.DataFrame:
        """One row for each number of slices and reading, on all facts (`slice` "all") and on each slice:
        `summarize`."""
        base = self.rows[self.rows["after"] == 0]
        tables = []
        of = lambda rows, chosen: rows if chosen == "all" else rows[(rows["slice"] == chosen) | rows["slice"].isna()]
        for after, rows in self.rows.groupby("after"):
            for chosen in ["all", *range(len(self.slices))]:
                tables.append(summarize(of(rows, chosen), of(base, chosen)).assign(after=after, slice=chosen))
        return pd.concat(tables, ignore_index=True)


def by_finetuning(objective: str | Objective = "edit", settings: Settings = Settings(steps=25),
                  texts: Sequence[str] | None = None) -> Method:
    """Fine-tuning of each slice, 25 steps as published."""
    def method(model: Model, split: Split, piece: Slice) -> Edit:
        return finetune(model, split, piece.mask, objective, settings, texts, piece.seed, forget=piece.facts)
    return method


def cut(facts: Facts, slices: int = 4) -> list[Facts]:
    """Slices of equal size in file order; if the facts do not divide, the first ones have one more."""
    if not 1 <= slices <= len(facts):
        raise EditError(f"{len(facts)} facts cannot be cut into {slices} slices")
    size, more = divmod(len(facts), slices)
    starts = [i * size + min(i, more) for i in range(slices + 1)]
    return [facts[a:b] for a, b in zip(starts, starts[1:])]


def sequential(model: Model, split: Split, localize: Localize, method: Method | None = None, slices: int = 4,
               seed: int = 0, name: str = "sequential", **measured) -> Sequential:
    """Edit `split.forget` slice by slice; the model itself is the same before and after, bit for bit.

    `method`: how a slice is edited, `by_finetuning()` by default; slice i has the seed `seed` + i. `measured`:
    arguments of `evaluate`. The rows of the method are called `name`. An exception on the way leaves the model as it
    was, too.
    """
    check_facts(split.forget, split)
    method, pieces = by_finetuning() if method is None else method, cut(split.forget, slices)
    number_of = {fact.key: number for number, facts in enumerate(pieces) for fact in facts}
    edits, done, tables = [], [], [_measured(model, split, "base", "none", 0, number_of, seed, measured)]
    with ExitStack() as applied:
        for number, facts in enumerate(progress(pieces, name)):
            earlier = split.forget[:sum(map(len, pieces[:number]))]
            piece = Slice(number, facts, earlier, localize(model, facts, number), seed + number)
            edit = method(model, split, piece)
            applied.enter_context(edit.applied(model))
            edits.append(edit)
            done.append(piece)
            tables.append(_measured(model, split, name, piece.mask.name, number + 1, number_of, seed, measured))
        names = dict.fromkeys(key for edit in edits for key in edit.values)
        new = {key: model.hf.get_parameter(key).detach().to("cpu", copy=True) for key in names}
    records = [{"facts": [f.subject for f in piece.facts], "mask": piece.mask.name, "mask_digest": piece.mask.digest,
                "edit": edit.record} for piece, edit in zip(done, edits)]
    record = {"method": name, "seed": seed, "split": split.record, "n_trained_on": len(split.forget), "slices": records}
    total = Edit.of(model, together(model, edits), new, record)
    return Sequential(total, tuple(edits), tuple(done), pd.concat(tables, ignore_index=True))


def together(model: Model, edits: Sequence[Edit]) -> Mask:
    """All weights that any of these edits may change."""
    entries: dict[str, torch.Tensor] = {}
    for edit in edits:
        for name, part in edit.parts.items():
            full = torch.ones(edit.values[name].shape, dtype=torch.bool) if part is None else part
            entries[name] = entries[name] | full if name in entries else full
    return from_weights(model, entries, "all slices")


def _measured(model: Model, split: Split, method: str, mask: str, after: int, number_of: dict, seed: int,
              measured: dict) -> pd.DataFrame:
    rows = evaluate(model, split, method, mask, seed, **measured)
    # retain and neighborhood rows have subjects of their own, or stand for a fact of the forget set
    slice_of = [number_of.get(key) for key in zip(rows["subject"], rows["relation"])]
    return rows.assign(after=after, slice=pd.array(slice_of, dtype="Int64"))
