"""What all attacks share: the rows they return, how an edited model is read, and what is refused."""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import pandas as pd

from helpers import metrics
from helpers.facts import Facts
from helpers.models import Model
from helpers.prompts import FORMATS, LATIN_SQUARE
from helpers.splits import Split
from helpers.unlearning.edit import Edit

FACT = ["subject", "relation", "answer", "edit"]
READINGS = ["prob_true", "prob_edit", "top_true", "top_edit", "top_other"]
COLUMNS = ["attack", "setting", "group", *FACT, *READINGS, "format", "counts", "control"]


class AttackError(ValueError):
    """An attack that cannot be made on these facts or this model."""


def applied(model: Model, edit: Edit | None) -> AbstractContextManager:
    """Within the block the model is edited; without an edit it is attacked as it is."""
    return nullcontext(model) if edit is None else edit.applied(model)


def tidy(table: pd.DataFrame, attack: str, setting: str, counts: bool = True, control: str = "", **extra) -> pd.DataFrame:
    """COLUMNS, then those of `extra`, from a table that has group, fact and readings."""
    table = table.assign(attack=attack, setting=setting, counts=counts, control=control, **extra)
    return table[[*COLUMNS, *extra]].reset_index(drop=True)


def with_readings(table: pd.DataFrame, facts: Facts) -> pd.DataFrame:
    """Rows of `metrics.scores` with `prob_*` and `top_*` as `helpers.unlearning.evaluation` defines them.

    The probability is among the options of MCQ and of closed relations, else over the full vocabulary. What is scored
    on whole answers (dashed spelling) is among the options, too, and `top_*` is then the choice among them. `top_other`
    is 1 where the choice among the options is neither of the two answers.
    """
    closed = {f.relation.name for f in facts if f.relation.options}
    restricted = (table["format"] == "mcq") | table["relation"].isin(closed)
    for answer in ("true", "edit"):
        p, top = (table.get(f"{kind}_{answer}", pd.Series(float("nan"), table.index)) for kind in ("p", "top"))
        table = table.assign(**{f"prob_{answer}": table[f"q_{answer}"].where(restricted | p.isna(), p),
                                f"top_{answer}": top.fillna(table[f"pick_{answer}"])})
    return table.assign(top_other=1 - table["pick_true"] - table["pick_edit"])


def read(model: Model, split: Split, groups: Mapping[str, Facts], formats: Sequence[str] = ("one_shot",),
         orders: Sequence[int] = LATIN_SQUARE, batch_size: int = 256) -> pd.DataFrame:
    """Put each group of facts to the model as it is, in each format: fact, readings, `group` and `format`.

    `mcq` is averaged over `orders`, and asked of the facts with three distractors. Solved examples come from the
    retain set, never from facts that are edited.
    """
    tables = []
    for group, facts in groups.items():
        for format in formats:
            asked = facts.where(lambda f: len(f.distractors) == 3) if format == "mcq" else facts
            if not len(asked):
                continue
            if format == "mcq":
                table = metrics.ask_mcq(model, asked, orders, batch_size)
            else:
                table = metrics.ask(model, asked, format, batch_size, **pool(format, split.retain_train))
            tables.append(with_readings(table, asked).assign(group=group))
    if not tables:
        raise AttackError(f"none of the facts can be asked in the formats {', '.join(formats)}")
    return pd.concat(tables, ignore_index=True)


def pool(format: str, facts: Facts) -> dict[str, Facts]:
    """The option that says where solved examples come from, for formats that have it."""
    return {"pool": facts} if "pool" in inspect.signature(FORMATS.get(format, len)).parameters else {}


def few(facts: Facts, n: int | None) -> Facts:
    """A fixed draw of n of the facts, in file order; all of them where there are no more, or for None."""
    n = len(facts) if n is None else min(n, len(facts))
    return facts[sorted(random.Random("kept").sample(range(len(facts)), n))]


def kept(split: Split, n: int) -> Facts:
    """A fixed draw of n retain facts that no training sees (of the trained ones where there are no others)."""
    return few(split.retain_test if len(split.retain_test) else split.retain_train, n)


def forgotten(split: Split, n: int | None) -> Facts:
    """A fixed draw of n of the facts to forget, as many of either half; all of them for None."""
    if n is None:
        return split.forget
    chosen = {fact.key for half in (split.attack_train, split.attack_test) for fact in few(half, n // 2)}
    return split.forget.where(lambda fact: fact.key in chosen)


def asked_of(split: Split, n_retain: int, n_forget: int | None) -> dict[str, Facts]:
    """Group → facts that are read after an attack that trains on none of them."""
    return {"forget": forgotten(split, n_forget), "retain": kept(split, n_retain)}


def asked_after(split: Split, shown: Facts, n_retain: int, n_forget: int | None) -> dict[str, Facts]:
    """Group → facts that are read after an attack was trained on `shown`: of the two halves at most `n_forget` together."""
    half = n_forget and n_forget // 2
    return {"forget": few(split.attack_test, half), "shown": few(shown, half), "retain": kept(split, n_retain)}


def untouched(model: Model, edit: Edit | None, split: Split, *, formats: Sequence[str] = ("one_shot", "mcq"),
              orders: Sequence[int] = LATIN_SQUARE, n_retain: int = 100, n_forget: int | None = None, batch_size: int = 256,
              seed: int = 0) -> pd.DataFrame:
    """No attack: the edited model's own answers, with which every attack is compared."""
    with applied(model, edit):
        table = read(model, split, asked_of(split, n_retain, n_forget), formats, orders, batch_size)
    return pd.concat([tidy(part, "none", str(format)) for format, part in table.groupby("format", sort=False)], ignore_index=True)


def check_halves(split: Split) -> None:
    """Raise `AttackError` unless there is a half to train on and another to read."""
    if not len(split.attack_train) or not len(split.attack_test):
        sizes = f"{len(split.forget)} fact(s), halves of {len(split.attack_train)} and {len(split.attack_test)}"
        raise AttackError(f"forget={split.spec!r} holds {sizes}: the attack trains on one half and reads the other, "
                          "so it needs two facts or more")


def check_trainable(model: Model, attack: str) -> None:
    """Raise `AttackError` for weights that are stored as integers."""
    stored = {str(p.dtype).removeprefix("torch.") for p in model.hf.parameters() if not p.is_floating_point()}
    if stored or getattr(model.hf, "is_quantized", False):
        how = ", ".join(sorted(stored)) or "by its loader"
        raise AttackError(f"{attack}: the weights of {model.name!r} are quantised ({how}) and take no gradient and no change; "
                          "load the model in bfloat16 or float32")


def swapped(split: Split) -> Split:
    """The same split with the halves exchanged: attacking both reads every forgotten fact once."""
    exchanged = {"attack_train": split.attack_test, "attack_test": split.attack_train}
    record = {**split.record, "attack_train": [f.subject for f in split.attack_test]}
    return Split(**{**vars(split), **exchanged, "record": record})
