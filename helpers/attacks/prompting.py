"""Asking in other words: the politest attack, and the one that most unlearning fails.

An edit trained on one prompt format may have changed that format only. So the same facts are asked as
multiple choice, as questions, in paraphrases, capitalised, spelled out, after solved cases about other facts (kept
ones, or forgotten ones with their true answers), and through what follows from the answer (an athlete's league).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from helpers import metrics, survey
from helpers.attacks.rows import FACT, AttackError, applied, asked_of, pool, tidy, with_readings
from helpers.facts import Facts
from helpers.models import Model
from helpers.progress import progress
from helpers.prompts import LATIN_SQUARE
from helpers.splits import Split, neighbors
from helpers.survey import GATE, Question
from helpers.unlearning.edit import Edit

FORGOTTEN = "few-shot, forgotten facts"


def questions(split: Split, shots: int = 3) -> list[Question]:
    """All of `survey.questions`, with solved cases from the retain set, and few-shot with forgotten facts as cases.

    The latter come from `attack_train`; a fact is never its own case.
    """
    asked = []
    for question in survey.questions(split.forget):
        options = {**question.options, **pool(question.format, split.retain_train)}
        if question.format != "few_shot":
            asked.append(replace(question, options=options))
            continue
        asked.append(Question("few-shot, kept facts", "few_shot", {**options, "k": shots}))
        asked.append(Question(FORGOTTEN, "few_shot", {"pool": split.attack_train, "k": shots}))
    return asked


def gate(model: Model, split: Split, asked: Sequence[Question] | Sequence[str] | None = None,
         orders: Sequence[int] = LATIN_SQUARE, bar: float = GATE) -> dict[str, bool]:
    """Label → whether the model as it is, unedited, masters that way of asking the forget set.

    The same for every edit of a model: compute it once and pass it on.
    """
    asked = _chosen(split, asked)
    rows, _ = _ask_all(model, split, {"forget": split.forget}, asked, orders, n_neighbors=1)
    passed = survey.gate(rows.assign(p_true=rows["prob_true"]), bar)
    return dict(zip(passed["question"], passed["counts"].astype(bool)))


def prompt(model: Model, edit: Edit | None, split: Split, *, asked: Sequence[Question] | Sequence[str] | None = None,
           orders: Sequence[int] = LATIN_SQUARE, counts: Mapping[str, bool] | None = None, n_retain: int = 100,
           n_forget: int | None = None, n_neighbors: int = 2, seed: int = 0) -> pd.DataFrame:
    """Put the facts to the edited model in every format: attack `prompt`, one setting a format.

    `asked` are questions or labels of `questions`, None for all. Groups `forget`, `retain` and, for the format
    `neighborhood`, `neighborhood`: up to `n_neighbors` kept facts with the same true answer, averaged, in the row of
    the forgotten fact. `counts` (from `gate`; None computes it) is False for formats in which the unedited model does
    not answer .9 of the forget set. Formats that these facts cannot have are left out; `rows.attrs["refused"]` says why.
    """
    asked = _chosen(split, asked)
    counts = gate(model, split, asked, orders) if counts is None else counts
    groups = asked_of(split, n_retain, n_forget)
    with applied(model, edit):
        rows, refused = _ask_all(model, split, groups, asked, orders, n_neighbors)
    parts = rows.groupby("question", sort=False)
    found = pd.concat([tidy(part, "prompt", label, counts.get(label, False)) for label, part in parts], ignore_index=True)
    found.attrs["refused"] = refused
    return found


def _chosen(split: Split, asked: Sequence[Question] | Sequence[str] | None) -> list[Question]:
    if asked is None or all(isinstance(question, Question) for question in asked):
        return questions(split) if asked is None else list(asked)
    known = {question.label: question for question in questions(split)}
    unknown = [label for label in asked if label not in known]
    if unknown:
        raise AttackError(f"prompting: no way of asking called {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    return [known[label] for label in asked]


def _ask_all(model: Model, split: Split, groups: Mapping[str, Facts], asked: Sequence[Question], orders: Sequence[int],
             n_neighbors: int) -> tuple[pd.DataFrame, dict[str, str]]:
    """Rows of the survey with readings and group, those about neighbors among them; label → reason for what was refused."""
    tables, refused = [], {}
    for group, facts in groups.items():
        rows, why = survey.survey(model, facts, progress(asked, f"asking, {group}", len(asked)), orders)
        tables.append(with_readings(rows, facts).assign(group=group))
        refused |= why
    others = Facts((*split.retain_train, *split.retain_test))
    near = groups["forget"].where(lambda f: len(neighbors(f, others, 1)) > 0)
    if len(near) and n_neighbors:
        rows = with_readings(metrics.ask(model, near, "neighborhood", pool=others, n=n_neighbors), near)
        rows = rows.groupby([*FACT, "format"], sort=False, as_index=False).mean(numeric_only=True)
        tables.append(rows.assign(group="neighborhood", question="neighborhood", right=rows["top_true"]))
    return pd.concat(tables, ignore_index=True), refused
