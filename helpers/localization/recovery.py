"""How much of a behaviour a patch brings back: the measures that all patching methods share.

    score   = (LD_patched − LD_corrupt) / (LD_clean − LD_corrupt),  LD = logit(true) − logit(alternative)
    p_score = (p_patched − p_corrupt) / (p_clean − p_corrupt),      p  = probability of the true answer

0 leaves the corrupted run as it is, 1 restores the clean one (spec sections 3 and 3.2). A fact whose two
runs hardly differ has nothing to bring back: its score is NaN, and `summarise` leaves it out of means.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

SMALLEST_GAP = {"ld": 1e-3, "p": 1e-4}  # between clean and corrupted; less is rounding, not behaviour


def measure(logits: torch.Tensor, answers: torch.Tensor) -> dict[str, torch.Tensor]:
    """`ld` and `p`, each (n,) float64 on the CPU, from logits (n, vocab) and token ids (n, 2): true, alternative."""
    pair = logits.gather(1, answers.to(logits.device))
    p = (pair[:, 0] - logits.logsumexp(-1)).exp()
    return {"ld": (pair[:, 0] - pair[:, 1]).cpu().double(), "p": p.cpu().double()}


def add_scores(table: pd.DataFrame, start: str = "corrupt", end: str = "clean") -> pd.DataFrame:
    """The table with `score` and `p_score` from its columns `ld_…` and `p_…` for patched, start and end run."""
    for of, name in (("ld", "score"), ("p", "p_score")):
        gap = table[f"{of}_{end}"] - table[f"{of}_{start}"]
        table[name] = (table[f"{of}_patched"] - table[f"{of}_{start}"]) / gap.where(gap.abs() >= SMALLEST_GAP[of])
    return table


def summarise(
    table: pd.DataFrame, by: Sequence[str] = ("component",), start: str = "corrupt", end: str = "clean"
) -> pd.DataFrame:
    """One row a group of a patching table, in order of appearance.

    `score` is the ratio of means, (mean LD_patched − mean LD_start) / (mean LD_end − mean LD_start), which no
    single fact with a small gap can dominate; `p_score` likewise. `mean_score` and `median_score` are over
    the facts' own scores, `n` counts facts and `n_undefined` those without a score.
    """
    groups = table.groupby(list(by), sort=False, dropna=False)
    runs = [f"{of}_{run}" for of in SMALLEST_GAP for run in ("patched", start, end)]
    out = add_scores(groups[runs].mean(), start, end)[["score", "p_score"]]
    out["mean_score"], out["median_score"] = groups["score"].mean(), groups["score"].median()
    out["n"], out["n_undefined"] = groups.size(), groups["score"].apply(lambda s: int(s.isna().sum()))
    return out.reset_index()


def describe(prompts) -> dict[str, list[str]]:
    """The columns that say which fact a row is about."""
    return {"subject": [f.subject for f in prompts.facts], "relation": [f.relation.name for f in prompts.facts]}
