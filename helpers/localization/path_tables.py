"""Tables of path patching, one row a sender and fact, and the projections that some of them hold.

Columns: `subject`, `relation`, `counterfactual` (the partner), `component`, `layer`, `head`, `ld_clean`, `ld_corrupt`,
`ld_patched` and `score`, which is NaN for a fact whose two runs hardly differ; a sender's score over facts is the
ratio of means (`evidence.component_scores`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import torch

from helpers.localization.counterfactual import Pairs
from helpers.localization.recovery import SMALLEST_GAP, describe
from helpers.models import Component


def lay_out(pairs: Pairs, senders: Sequence[Component], values: torch.Tensor, clean: torch.Tensor, projected: bool) -> pd.DataFrame:
    """The table of what path patching computed.

    `values` (1 + senders, n) are LD, first of the corrupted run, then with each sender patched; `clean` (n,) is LD of the
    clean run. If `projected`, they are projections of changes instead, the first of them the full change's own square, and
    the columns `effect`, `total` and `score`, their ratio.
    """
    n, partners = len(senders), [fact.subject for fact in pairs.corrupted.facts]
    facts = describe(pairs.clean) | {"counterfactual": partners}
    told = {"component": map(str, senders), "layer": (s.layer for s in senders), "head": (s.head for s in senders)}
    columns = {name: cells * n for name, cells in facts.items()}
    columns |= {name: [cell for cell in cells for _ in partners] for name, cells in told.items()}
    table = pd.DataFrame(columns).astype({"head": "Int64"})
    if projected:
        table["effect"], table["total"] = values[1:].flatten().numpy(), values[0].repeat(n).numpy()
        return table.assign(score=table["effect"] / table["total"].where(table["total"] > 0))
    gap = clean - values[0]
    table["ld_clean"], table["ld_corrupt"] = clean.repeat(n).numpy(), values[0].repeat(n).numpy()
    table["ld_patched"] = values[1:].flatten().numpy()
    scores = (values[1:] - values[0]) / gap.where(gap.abs() >= SMALLEST_GAP["ld"], torch.nan)
    return table.assign(score=scores.flatten().numpy())


def projections(full: torch.Tensor, changes: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """First the square of the full change (b,), then the projection of each change on it: (1 + changes, b)."""
    full = full.flatten(1).double()
    parts = [full, *(0 * full if change is None else change.flatten(1).double() for change in changes)]
    return torch.stack([(part * full).sum(-1) for part in parts])
