"""An edit carried out in part: the weights on the straight line from the old to the new ones.

    half = partly(model, edit, 0.5)
    path = along(model, split, edit, (0.25, 0.5, 0.75, 1.0))     # what each part does
    at_first(path, "edit", 0.9)                                  # see helpers.unlearning.trajectory

Edits of any method can so be compared where they are equally successful, also those that are no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch

from helpers.models import Model
from helpers.splits import Split
from helpers.unlearning.edit import Edit, EditError, select
from helpers.unlearning.evaluation import evaluate, summarize


def partly(model: Model, edit: Edit, share: float) -> Edit:
    """The edit with `share` of its change; 1 is the edit itself. Raises `EditError` for another model and for a share outside 0 to 1."""
    if not 0 <= share <= 1:
        raise EditError(f"share={share}: an edit is carried out from 0 to 1 of it")
    edit.check(model)
    values = {}
    for name, new in edit.values.items():
        old = select(model.hf.get_parameter(name).detach(), edit.parts[name]).cpu()
        values[name] = new if share == 1 else torch.lerp(old.double(), new.double(), share).to(new.dtype)
    changes = edit.changes.assign(**{name: share * edit.changes[name] for name in ("norm", "relative", "largest")})
    return replace(edit, values=values, changes=changes, record={**edit.record, "share": share})


def along(model: Model, split: Split, edit: Edit, shares: Sequence[float], base: pd.DataFrame | None = None, reading: str = "probability",
          **measured) -> pd.DataFrame:
    """One row a share, from 0 on: `summarize` of `evaluate` in one reading, and the norm of the change.

    `measured`: arguments of `evaluate`; few facts and texts will do. `base`: rows of the unedited model, measured in the same way.
    """
    base = evaluate(model, split, **measured) if base is None else base
    tables = [summarize(base, base).assign(share=0.0, norm=0.0)]
    for share in sorted(set(shares) - {0.0}):
        part = partly(model, edit, share)
        with part.applied(model):
            tables.append(summarize(evaluate(model, split, **measured), base).assign(share=share, norm=part.norm))
    table = pd.concat(tables, ignore_index=True)
    return table[table["reading"] == reading].drop(columns=["method", "mask", "seed", "reading"]).reset_index(drop=True)
