"""What a tuning trial is judged by: a cheap measurement, and the selection scores made of it.

Both scores are on the probability reading (what `evaluate` calls the paper's) of the facts practised on:

    paper   accuracy on text tokens + (1 − forget) + retain + edit          (spec section 4.1)
    ours    success · 2^−harm
            success   mean of (1 − forget) and edit
            harm      shortfall of retain beyond .02 of the base, in units of .03, + that of MCQ retain, in units of
                      .10, + excess of text loss, in units of .1 nat

In `ours` success counts half where one measure has just come to what counts as collapse, a quarter where two have: a
method cannot buy success with harm, as it can in `paper`, nor win by doing nothing, as it would if harm were
subtracted. Where the goal is to forget there is no edit answer, and its term is left out of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch

from helpers.chunks import over_rows
from helpers.models import Model
from helpers.splits import Split
from helpers.unlearning.evaluation import RETAIN_KEPT, evaluate
from helpers.unlearning.forward import hidden_states, logits_of
from helpers.unlearning.terms import Sequences
from helpers.unlearning.texts import general_texts


def measure(model: Model, practice: Split, method: str, mask: str, texts: Sequence[str] | None = None,
            n_retain: int = 64, **options) -> tuple[pd.DataFrame, float]:
    """Rows of `evaluate` on few facts and texts, and the share of text tokens that are the likeliest."""
    texts = general_texts(50, held_out=True) if texts is None else list(texts)
    rows = evaluate(model, practice, method, mask, texts=texts, n_retain=n_retain, **options)
    return rows, text_accuracy(model, texts)


@torch.no_grad()
def text_accuracy(model: Model, texts: Sequence[str], length: int = 128, batch_size: int = 64) -> float:
    """Share of the texts' tokens, from the second on, that the model holds to be the likeliest."""
    sequences = Sequences.of_texts(model.tokenizer, texts, length)

    def right(rows: torch.Tensor) -> int:
        tokens, mask = sequences.batch(rows, model.device)
        real = mask[:, 1:].bool()
        guessed = logits_of(model, hidden_states(model, tokens, mask)[:, :-1][real]).argmax(-1)
        return int((guessed == tokens[:, 1:][real]).sum())

    return sum(over_rows(right, len(sequences), batch_size)) / int(sequences.mask[:, 1:].sum())


def scored(table: pd.DataFrame, base: pd.DataFrame, goal: str) -> pd.DataFrame:
    """Adds success, harm, both scores and whether a trial is on the frontier."""
    before = base[base["reading"] == "probability"].iloc[0]
    column = lambda name: pd.to_numeric(table[name]) if name in table else pd.Series(math.nan, table.index)
    over = lambda change, unit: change.clip(lower=0) / unit
    forgotten, edit, retain = 1 - column("forget"), column("edit"), column("retain")
    success = (forgotten + edit) / 2 if goal == "edit" else forgotten
    harm = over(before["retain"] - RETAIN_KEPT - retain, 0.03)
    if "mcq_retain" in before:
        harm = harm + over(before["mcq_retain"] - column("mcq_retain"), 0.10)
    # a loss that is not a number is as bad as can be, a trial without an edit has no harm at all
    lost = column("text_loss").where(retain.isna(), column("text_loss").fillna(math.inf))
    harm = harm + over(lost - before["text_loss"], 0.10)
    paper = column("text_accuracy") + forgotten + retain + (edit if goal == "edit" else 0.0)
    beats = lambda s, r: (success >= s) & (retain >= r) & ((success > s) | (retain > r))
    beaten = [bool(beats(s, r).any()) for s, r in zip(success, retain)]
    frontier = ~pd.Series(beaten, table.index) & retain.notna()
    return table.assign(success=success, harm=harm, paper=paper, ours=success * 0.5**harm, frontier=frontier)
