"""Relearning: train the edited model on the true answers of half the forgotten facts, read the other half.

What comes back without having been shown was suppressed, not removed. Every reading is a dose: so many facts shown, so
many steps, at such a rate. Beside it stand the facts that were shown, retain accuracy (a wrecked model is no recovery),
and two controls: the same attack on invented names, and training on unrelated text.

As published (spec section 6.1): LoRA on every matrix, α 32, dropout .05, learning rate 2e-4, cosine over 20 steps without
clipping, retain and text terms with weight 1, rank 512 there and d_model / 6, which is the same, here. A step draws 32
examples of each term; texts are half as long as there and twice as many, which makes as many tokens of text.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
from scipy.stats import ttest_ind

from helpers.attacks.depth import ABSENT
from helpers.attacks.invented import CONTROL, invented_split
from helpers.attacks.rows import AttackError, applied, asked_after, check_halves, check_trainable, read, tidy
from helpers.facts import Facts
from helpers.models import Model
from helpers.prompts import LATIN_SQUARE
from helpers.selection import everything
from helpers.splits import Split
from helpers.unlearning.edit import Edit
from helpers.unlearning.finetune import finetune
from helpers.unlearning.lora import finetune_lora
from helpers.unlearning.objectives import Relearn
from helpers.unlearning.training import Settings

PUBLISHED = Settings(learning_rate=2e-4, steps=20, batch=32, clip=None, text_tokens=64)
HOW = ("lora", "full")
DOSE = ["attack", "control", "group", "format", "shown", "rate", "step", "steps"]


def relearn(model: Model, edit: Edit | None, split: Split, *, how: str = "lora", rates: Sequence[float] = (2e-4,),
            shown: Sequence[int | None] = (None,), steps: Sequence[int] = (0, 10, 20), settings: Settings = PUBLISHED,
            rank: int | None = None, texts: Sequence[str] | None = None, formats: Sequence[str] = ("one_shot", "mcq"),
            orders: Sequence[int] = LATIN_SQUARE, n_retain: int = 100, n_forget: int | None = None, invented: bool = False, seed: int = 0) -> pd.DataFrame:
    """Attack `relearn lora` or `relearn full`: one training a rate and number of facts shown, read after each of `steps`.

    Args:
        how: `lora`, or `full` for fine-tuning of all matrices.
        rates: learning rates. The cosine always falls to 0 at the last of `steps`.
        shown: how many facts of `attack_train` are shown, None for all, 0 for none (retain and text terms only). Fewer
            facts are a part of more, with the same shares of answers as far as possible.
        settings: everything else of the training; its rate and number of steps are not used.
        texts: general text for the third term; None takes the tiny models' own kind.
        invented: also attack as many invented names; their rows have the control `invented names`.

    Groups: `forget` (`attack_test`, never shown), `shown`, `retain`. Further columns: `how`, `shown`, `rate`, `step`, `steps` (at which
    the cosine ends). A training that breaks down gives a warning and no rows after. Raises `AttackError` for a split without
    two halves, more facts to show than there are, or a quantised model.
    """
    check_trainable(model, f"relearn {how}")
    check_halves(split)
    for n in shown:
        if n is not None and not 0 <= n <= len(split.attack_train):
            raise AttackError(f"relearning: {n} facts to show, and attack_train holds {len(split.attack_train)}")
    tables = []
    for control in ("", CONTROL) if invented else ("",):
        given = invented_split(split, model.tokenizer, seed) if control else split
        for n in shown:
            for rate in rates:
                facts = nested(given.attack_train, len(given.attack_train) if n is None else n, seed)
                dose = {"how": how, "shown": len(facts), "rate": rate}
                label = f"{'all' if n is None else n} facts, lr {rate:g}"
                terms = ("forget", "retain", "text") if len(facts) else ("retain", "text")
                table = _curve(model, edit, given, facts, terms, how, replace(settings, learning_rate=rate), steps, rank, texts,
                               seed, partial(read, model, given, formats=formats, orders=orders), n_retain, n_forget)
                tables += _named(table, f"relearn {how}", label, max(steps), control, dose)
    return pd.concat(tables, ignore_index=True)


def relearn_text(model: Model, edit: Edit | None, split: Split, *, how: str = "full", rates: Sequence[float] = (2e-4,),
                 steps: Sequence[int] = (0, 10, 20), settings: Settings = PUBLISHED, rank: int | None = None,
                 texts: Sequence[str] | None = None, formats: Sequence[str] = ("one_shot", "mcq"),
                 orders: Sequence[int] = LATIN_SQUARE, n_retain: int = 100, n_forget: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Attack `relearn text`: training on unrelated text alone, with no fact at all. Otherwise as `relearn`; no group `shown`."""
    check_trainable(model, "relearn text")
    check_halves(split)
    tables = []
    for rate in rates:
        table = _curve(model, edit, split, split.attack_train[:0], ("text",), how, replace(settings, learning_rate=rate), steps,
                       rank, texts, seed, partial(read, model, split, formats=formats, orders=orders), n_retain, n_forget)
        tables += _named(table, "relearn text", f"{how}, lr {rate:g}", max(steps), "", {"how": how, "shown": 0, "rate": rate})
    return pd.concat(tables, ignore_index=True)


def nested(facts: Facts, n: int, seed: int = 0) -> Facts:
    """n of the facts, in file order: the first n of one drawn order in which the answers take turns."""
    rng, by_answer = random.Random(f"shown-{seed}"), defaultdict(list)
    rows = rng.sample(range(len(facts)), len(facts))
    for row in rows:
        by_answer[facts[row].answer].append(row)
    # the k-th of m facts with an answer comes when (k + ½) / m of all have come
    when = {row: (k + 0.5) / len(group) for group in by_answer.values() for k, row in enumerate(group)}
    return facts[sorted(sorted(rows, key=when.get)[:n])]


def dose_response(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over facts by attack, control, group, format, facts shown, rate, step and steps in all, with `n` facts each."""
    means = rows.groupby(DOSE, sort=False)[["prob_true", "prob_edit", "top_true", "top_edit"]].mean()
    return means.assign(n=rows.groupby(DOSE, sort=False).size()).reset_index()


def curves(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of relearning with what figures call them: `curve` and `dose` ("lora, 32 facts, rate 0.002, 20 steps").

    Curves are `forgotten` (the half that was not shown), `shown`, `retained`, `invented names`, of which none was shown either, and
    `model without the facts`, rows of the same attack on another model.
    """
    rows = rows[rows["attack"].isin([f"relearn {how}" for how in HOW])]
    names = {("forget", ""): "forgotten", ("shown", ""): "shown", ("retain", ""): "retained", ("forget", CONTROL): CONTROL,
             ("forget", ABSENT): ABSENT}
    curve = [names.get(key) for key in zip(rows["group"], rows["control"])]
    dose = [f"{how}, {shown:.0f} facts, rate {rate:g}, {steps:.0f} steps" for how, shown, rate, steps
            in rows.reindex(columns=["how", "shown", "rate", "steps"]).itertuples(index=False)]
    return rows.assign(curve=curve, dose=dose).dropna(subset="curve")


def gains(rows: pd.DataFrame, by: Sequence[str] = ("mask", "dose"), control: str = CONTROL) -> pd.DataFrame:
    """Forgotten facts beside the control before and after training, from rows of `curves` in one format: what is there, and what training changed.

    Three rows (`compared`: before, after, change) a group of `by` that has both; columns `forgotten`, the control, `difference`, and its
    `low` and `high` (Welch's 95 % interval over facts: names and facts are not the same, so nothing is paired).
    """
    found = []
    for key, part in rows[rows["curve"].isin(["forgotten", control])].groupby([*by], sort=False):
        values = {}
        for curve, line in part.groupby("curve"):
            said = line.pivot_table(index=["subject", "relation"], columns="step", values="top_true")
            first, last = said[said.columns.min()], said[said.columns.max()]
            values[curve] = {"before": first, "after": last, "change": last - first}
        for compared in ("before", "after", "change") if len(values) == 2 else ():
            one, other = values["forgotten"][compared], values[control][compared]
            low = high = np.nan
            if np.ptp(one) > 0 or np.ptp(other) > 0:
                low, high = ttest_ind(one, other, equal_var=False).confidence_interval()
            found.append(dict(zip(by, key)) | {"compared": compared, "forgotten": one.mean(), control: other.mean(),
                                               "difference": one.mean() - other.mean(), "low": low, "high": high})
    return pd.DataFrame(found, columns=[*by, "compared", "forgotten", control, "difference", "low", "high"])


def _curve(model: Model, edit: Edit | None, split: Split, facts: Facts, terms: tuple[str, ...], how: str, settings: Settings,
           steps: Sequence[int], rank: int | None, texts: Sequence[str] | None, seed: int,
           reading: Callable[[dict[str, Facts]], pd.DataFrame], n_retain: int, n_forget: int | None) -> pd.DataFrame:
    """One training from the edited model, read after each of the steps."""
    if how not in HOW:
        raise AttackError(f"relearning: how={how!r}; there are {', '.join(HOW)}")
    if not steps or min(steps) < 0:
        raise AttackError(f"relearning: steps {tuple(steps)}; give the numbers of steps after which to read, 0 or more")
    groups = asked_after(split, facts, n_retain, n_forget)
    tables = []

    def watch(step: int) -> dict[str, float]:
        if step in steps:
            tables.append(reading({name: group for name, group in groups.items() if len(group)}).assign(step=step))
        return {}

    with applied(model, edit):
        if not max(steps):
            watch(0)
        else:
            given = dict(objective=Relearn(terms=terms), settings=replace(settings, steps=max(steps)), texts=texts, seed=seed,
                         forget=facts if len(facts) else split.attack_train, watch=watch)
            if how == "full":
                finetune(model, split, everything(model), **given)
            else:
                finetune_lora(model, split, rank=rank, **given)
    return pd.concat(tables, ignore_index=True)


def _named(table: pd.DataFrame, attack: str, label: str, steps: int, control: str, dose: dict) -> list[pd.DataFrame]:
    """The table cut into settings: rate, facts shown, step of how many (the cosine depends on it) and format read."""
    parts = table.groupby(["step", "format"], sort=False)
    return [tidy(part, attack, f"{label}, step {step} of {steps}, {format}", control=control, **dose, step=step, steps=steps)
            for (step, format), part in parts]
