"""What an edit did: every format, the facts around it, and text in general, on whole fixed sets.

    base = evaluate(model, split)
    with edit.applied(model):
        rows = evaluate(model, split, method="finetune", mask=edit.record["mask"])
    table = summarize(rows, base)              # one row a method, mask and reading, with flags

Two readings of each measure: `probability`, the paper's (mean probability; restricted to the options where the relation
or the format has a closed set of them), and `top1`, the share of prompts on which the answer is the likeliest of all tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pandas as pd

from helpers import metrics
from helpers.facts import Facts
from helpers.models import Model
from helpers.prompts import LATIN_SQUARE
from helpers.splits import Split, neighbors
from helpers.unlearning.texts import general_texts

KEY = ["subject", "relation", "answer", "edit", "format"]
RETAIN_KEPT, RETAIN_LOST, MCQ_LOST, TEXT_LOST = 0.02, 0.05, 0.10, 0.10
READINGS = {"probability": "prob", "top1": "top"}


def evaluate(model: Model, split: Split, method: str = "base", mask: str = "none", seed: int = 0, *, forget: Facts | None = None,
             texts: Sequence[str] | None = None, orders: Sequence[int] = LATIN_SQUARE, n_retain: int = 200, n_neighbors: int = 2,
             brief: bool = False, batch_size: int = 256) -> pd.DataFrame:
    """Measure the model as it is: one row a fact, format and group, and one for general text.

    Groups: `forget` (all formats: one_shot, qa, paraphrase, mcq, and the attributes that follow from the answer),
    `retain` (one_shot, mcq, attributes; a fixed draw of `n_retain` facts of `retain_test`), `neighborhood` (facts outside
    the forget set with the same true answer), `text` (column `loss`, nats a token). `mcq` is averaged over `orders`,
    `paraphrase` over all paraphrases. Formats that some facts cannot have are asked of the others.

    Columns beside KEY: `prob_*` (the paper's probability), and those of `metrics.scores`. `forget` replaces the forget
    set, e.g. by `split.attack_test` in whole-sport editing. `texts` None: 200 texts held out from the tiny models' training.
    `brief`: only what `collapse` judges by, one_shot, mcq and text, in some .7 of the time.
    """
    forget = split.forget if forget is None else forget
    kept = Facts((*split.retain_train, *split.retain_test))
    retain = _sample(split.retain_test if len(split.retain_test) else split.retain_train, n_retain)
    ask = lambda facts, format, **options: metrics.ask(model, facts, format, batch_size, **options)
    mcq = lambda facts: metrics.ask_mcq(model, facts, orders, batch_size)
    # the solved example of a prompt is never an edited fact
    one_shot = lambda facts: ask(facts, "one_shot", pool=split.retain_train)
    both = (("forget", forget), ("retain", retain))
    tables = [(group, one_shot(facts)) for group, facts in both]
    for group, facts in both:
        asked = facts.where(lambda f: len(f.distractors) == 3)
        tables.append((group, mcq(asked) if len(asked) else None))
    if not brief:
        tables += [("forget", ask(forget, "qa")), ("forget", _paraphrases(forget, ask))]
        near = forget.where(lambda f: len(neighbors(f, kept, 1)) > 0)
        if len(near):
            tables.append(("neighborhood", _per_fact(ask(near, "neighborhood", pool=kept, n=n_neighbors))))
        # an edit may break a format for everyone, which only the facts that should stay can show
        for group, facts in both:
            for name in dict.fromkeys(a.name for f in facts for a in f.relation.attributes):
                has = facts.where(lambda f: name in {a.name for a in f.relation.attributes})
                tables.append((group, ask(has, "attribute", name=name).assign(format=name)))
    texts = general_texts(200, held_out=True) if texts is None else texts
    text = pd.DataFrame({"format": ["text"], "loss": [metrics.text_loss(model, texts)]})
    closed = {f.relation.name for f in (*forget, *kept) if f.relation.options}
    rows = pd.concat([_with_probability(table, closed).assign(group=group) for group, table in tables if table is not None]
                     + [text.assign(group="text")], ignore_index=True)
    own = {"method": method, "mask": mask, "seed": seed}
    rows = rows.assign(**own)
    return rows[[*own, "group", *KEY, *(c for c in rows if c not in {*own, "group", *KEY})]]


def summarize(rows: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """One row a method, mask, seed and reading, from rows of `evaluate`; `base` are those of the unedited model.

    `forget`, `edit` and `retain` on the training format; `mcq_*`, `qa_*`, `paraphrase_*`, `neighborhood_*` and one pair an
    attribute, where `_forget` is the true answer (`_retain` and `neighborhood_true` for facts that should stay) and `_edit` the
    edit answer; `text_loss` in nats. Flags: `retain_kept` (retain at least base − .02); `collapsed` with `collapse` saying
    why (retain below base − .05, MCQ retain below base − .10, text loss above base + .1 nat). They are judged within a
    reading, against the base in the same reading.
    """
    table = _measures(rows)
    before = _measures(base).drop_duplicates("reading").set_index("reading")
    reasons = [collapse(row, before.loc[row["reading"]]) for _, row in table.iterrows()]
    kept = [row["retain"] >= before.loc[row["reading"], "retain"] - RETAIN_KEPT for _, row in table.iterrows()]
    return table.assign(retain_kept=kept, collapsed=[bool(r) for r in reasons], collapse=["; ".join(r) for r in reasons])


def _measures(rows: pd.DataFrame) -> pd.DataFrame:
    found = []
    for (method, mask, seed), part in rows.groupby(["method", "mask", "seed"], sort=False):
        losses = part.loc[part["group"] == "text", "loss"]
        for reading, column in READINGS.items():
            row = {"method": method, "mask": mask, "seed": seed, "reading": reading}
            for (group, format), cell in part[part["group"] != "text"].groupby(["group", "format"], sort=False):
                row |= {name: cell[f"{column}_{answer}"].mean() for answer, name in measure_names(group, format).items()}
            found.append({**row, "text_loss": losses.mean()})
    return pd.DataFrame(found)


def measure_names(group: str, format: str) -> dict[str, str]:
    """What the readings of the true and of the edit answer are called, for facts of a group asked in a format."""
    if group == "neighborhood":
        return {"true": "neighborhood_true", "edit": "neighborhood_edit"}
    if group == "retain":
        return {"true": "retain" if format == "one_shot" else f"{format}_retain"}
    if format == "one_shot":
        return {"true": "forget", "edit": "edit"}
    return {"true": f"{format}_forget", "edit": f"{format}_edit"}


def collapse(row: pd.Series, base: pd.Series) -> list[str]:
    """Why a row of means (`retain`, `mcq_retain`, `text_loss`) counts as collapsed; a measure that is not there is no reason."""
    limits = {"retain": -RETAIN_LOST, "mcq_retain": -MCQ_LOST, "text_loss": TEXT_LOST}
    found = []
    for name, limit in limits.items():
        change = row.get(name, float("nan")) - base.get(name, float("nan"))
        # a loss that is NaN after the edit is a collapse, too
        if (change < limit if limit < 0 else change > limit) or (pd.isna(row.get(name, 0.0)) and pd.notna(base.get(name))):
            found.append(f"{name} {change:+.2f}")
    return found


def broken(row: pd.Series, base: pd.Series) -> list[str]:
    """Formats of which `collapse` does not speak and in which facts that should stay have lost more than in multiple choice may be lost.

    Named by their measure, such as `league_retain`: an edit may break a question for every subject.
    """
    changes = {name: row[name] - base.get(name, float("nan")) for name in row.index if str(name).endswith("_retain") and name != "mcq_retain"}
    return [f"{name} {change:+.2f}" for name, change in changes.items() if change < -MCQ_LOST]


def _with_probability(table: pd.DataFrame, closed: set[str]) -> pd.DataFrame:
    """Adds the paper's probability: among the options of MCQ and of closed relations, else over the full vocabulary."""
    restricted = (table["format"] == "mcq") | table["relation"].isin(closed)
    return table.assign(**{f"prob_{a}": table[f"q_{a}"].where(restricted, table[f"p_{a}"]) for a in ("true", "edit")})


def _paraphrases(facts: Facts, ask: Callable[..., pd.DataFrame]) -> pd.DataFrame | None:
    """Mean over each fact's paraphrases; None where no fact has any."""
    count = lambda f: len(f.paraphrases or f.relation.paraphrases)
    having = [(which, facts.where(lambda f: count(f) > which)) for which in range(max(map(count, facts)))]
    return _per_fact(pd.concat([ask(some, "paraphrase", which=which) for which, some in having])) if having else None


def _per_fact(table: pd.DataFrame) -> pd.DataFrame:
    return table.groupby(KEY, sort=False, as_index=False).mean(numeric_only=True)


def _sample(facts: Facts, n: int) -> Facts:
    """A fixed draw of n facts, the same for every edit; in file order."""
    chosen = random.Random("retain").sample(range(len(facts)), min(n, len(facts)))
    return facts[sorted(chosen)]
