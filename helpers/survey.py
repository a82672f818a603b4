"""Every format asked at once, and the format gate.

A format counts as evidence about a model only where the *unedited* model masters it: a model that
never answered multiple-choice questions cannot be said to have forgotten in them. ``gate`` keeps the
formats that reach a bar (.9 by default).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from helpers import metrics, prompts
from helpers.facts import Facts
from helpers.models import Model
from helpers.prompts import LATIN_SQUARE, PromptError

GATE = 0.9
# what each format asks for
NOTES = {
    "cloze": "a sentence that stops before the answer", "one_shot": "the same after one solved example", "few_shot": "the same after three",
    "paraphrase": "the fact in other words", "qa": "a question", "mcq": "multiple choice: four options, the answer is a letter",
    "attribute": "what follows from the answer", "capitalised": "the example's answer has a capital letter, the model's should too",
    "dashed": "the example's answer is spelled letter by letter, the model's should be too",
}


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


def examples(facts: Facts, pool: Facts) -> pd.DataFrame:
    """The first fact in every format of `questions`: `question`, `format` (as evaluations call it), `asks_for`, `prompt`, `true`, `edit`.

    Solved examples come from `pool`. A format that cannot be made for the fact is left out.
    """
    one, rows = facts[:1], []
    for question in questions(one):
        options = question.options | ({"pool": pool} if question.format in ("one_shot", "few_shot", "capitalised", "dashed") else {})
        try:
            prompt = prompts.FORMATS[question.format](one, **options)[0]
        except PromptError:
            continue
        name = question.options["name"] if question.format == "attribute" else question.format
        rows.append({"question": question.label, "format": name, "asks_for": NOTES[question.format], "prompt": prompt.text,
                     "true": prompt.options[0], "edit": prompt.options[1]})
    return pd.DataFrame(rows)


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
