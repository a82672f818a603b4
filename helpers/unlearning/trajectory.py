"""What an edit does while it is trained, and how far its weights move.

    path = Trajectory(model, split, mask, range(0, 51, 5))
    edit = finetune(model, split, mask, "edit", settings, watch=path)
    at_first(path.table(), "edit", 0.9)      # everything at the moment when success reaches .9
    by_matrix(model, edit)                   # norm of the change of every matrix

Edits compared after as many steps differ in how far they have come. Along their trajectories they can be compared where they are
equally successful, or where their weights have moved equally far.
"""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd
import torch

from helpers.masks import Mask, matrices
from helpers.models import Model
from helpers.splits import Split
from helpers.unlearning.edit import Edit, select
from helpers.unlearning.evaluation import evaluate, summarize


class Trajectory:
    """A `watch` for training: `summarize` of `evaluate`, in one reading, and the norm of the change, at some steps.

    `measured`: arguments of `evaluate`; few facts and texts will do. Make one for each edit, before it is trained.
    """

    def __init__(self, model: Model, split: Split, mask: Mask, steps: Collection[int], reading: str = "probability", **measured):
        self.model, self.split, self.mask, self.steps, self.reading, self.measured = model, split, mask, steps, reading, measured
        self.start = self._weights()
        self._before: pd.DataFrame | None = None
        self._rows: list[pd.DataFrame] = []

    def __call__(self, step: int) -> dict[str, float]:
        if step not in self.steps:
            return {}
        rows = evaluate(self.model, self.split, mask=self.mask.name, **self.measured)
        self._before = rows if self._before is None else self._before
        table = summarize(rows, self._before)
        table = table[table["reading"] == self.reading].drop(columns=["method", "seed", "reading"])
        norm = sum(float((now.double() - old.double()).norm()) ** 2 for now, old in zip(self._weights(), self.start)) ** 0.5
        self._rows.append(table.assign(step=step, norm=norm))
        return {"norm": norm}

    def table(self) -> pd.DataFrame:
        """One row a measured step, in order; flags are judged against the first of them."""
        return pd.concat(self._rows, ignore_index=True)

    def _weights(self) -> list[torch.Tensor]:
        named = dict(self.model.hf.named_parameters())
        return [select(named[name].detach(), part).to("cpu", copy=True) for name, part in self.mask.entries.items()]


def at_first(path: pd.DataFrame, measure: str, target: float) -> pd.Series:
    """The numbers of a trajectory at the first moment when `measure` reaches `target`, on straight lines between the measured steps.

    All missing where it never does.
    """
    numbers = path.select_dtypes("number")
    reached = numbers.index[numbers[measure] >= target]
    if not len(reached):
        return numbers.iloc[0] * float("nan")
    place = numbers.index.get_loc(reached[0])
    after, before = numbers.iloc[place], numbers.iloc[max(place - 1, 0)]
    rise = after[measure] - before[measure]
    return before + (after - before) * ((target - before[measure]) / rise if rise else 0.0)


def by_matrix(model: Model, edit: Edit) -> pd.DataFrame:
    """`norm` of the change, and `relative` to the norm of the old weights, by `layer` and `matrix`; 0 where nothing was trained.

    Where q, k and v are one fused parameter each has the figures of the whole.
    """
    changes = edit.changes.set_index("parameter")[["norm", "relative"]]
    units = matrices(model)
    found = changes.reindex([f"{model.path(unit.kind, unit.layer)}.weight" for unit in units]).fillna(0.0)
    return found.reset_index(drop=True).assign(layer=[unit.layer for unit in units], matrix=[unit.kind for unit in units])
