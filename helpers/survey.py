"""Every format asked at once, and the format gate.

A format counts as evidence about a model only where the *unedited* model masters it: a model that
never answered multiple-choice questions cannot be said to have forgotten in them. ``gate`` keeps the
formats that reach a bar (.9 by default).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from helpers import metrics
from helpers.facts import Facts
from helpers.models import Model
from helpers.prompts import LATIN_SQUARE, PromptError

GATE = 0.9


@dataclass(frozen=True)
class Question:
    """A format with its options, under the name used in tables and figures."""

    label: str
    format: str
    options: dict = field(default_factory=dict)


def questions(facts: Facts) -> list[Question]:
    """Every way in which these facts can be asked about; paraphrases and attributes as far as all relations have them."""
    relations = {f.relation.name: f.relation for f in facts}.values()
    n_phrases = min(len(f.paraphrases or f.relation.paraphrases) for f in facts)
    shared = [a.name for a in next(iter(relations)).attributes if all(a.name in {b.name for b in r.attributes} for r in relations)]
    return [
        Question("cloze", "cloze"), Question("one-shot", "one_shot"), Question("few-shot", "few_shot"),
        *(Question(f"paraphrase {i + 1}", "paraphrase", {"which": i}) for i in range(n_phrases)),
        Question("QA", "qa"), Question("QA, system sentence", "qa", {"system": True}), Question("MCQ", "mcq"),
        *(Question(name, "attribute", {"name": name}) for name in shared),
        Question("capitalised", "capitalised"), Question("dashed", "dashed"),
    ]


def survey(model: Model, facts: Facts, asked: Sequence[Question] | None = None, orders: Sequence[int] = LATIN_SQUARE) -> tuple[pd.DataFrame, dict[str, str]]:
    """Put the facts to the model in every format.

    Returns the rows of `metrics.scores` with the columns ``question`` (label) and ``right`` (1.0 where
    the argmax of the full vocabulary is the true answer; among the options for dashed spelling),
    and, for formats that cannot be made for these facts, label -> reason.
    """
    tables, refused = [], {}
    for question in asked or questions(facts):
        try:
            if question.format == "mcq":
                table = metrics.ask_mcq(model, facts, orders)
            else:
                table = metrics.ask(model, facts, question.format, **question.options)
        except PromptError as error:
            refused[question.label] = str(error)
            continue
        right = table["top_true"] if "top_true" in table else table["pick_true"]
        tables.append(table.assign(question=question.label, right=right))
    return pd.concat(tables, ignore_index=True), refused


def gate(rows: pd.DataFrame, bar: float = GATE) -> pd.DataFrame:
    """One row a question: accuracy, mean p(true), and whether it passes the bar."""
    table = rows.groupby("question", sort=False).agg(accuracy=("right", "mean"), p_true=("p_true", "mean"), facts=("right", "size")).reset_index()
    return table.assign(counts=table["accuracy"] >= bar)
