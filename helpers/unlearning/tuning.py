"""The same tuning budget for every method with every mask: random search on facts that nothing else is measured on.

    practice = validation(split)
    methods = [tunable_finetune(chosen, "edit", texts=texts) for chosen in (flu, rival)]
    tuned = tune_all(model, practice, methods, FINETUNE, trials=12, folder="runs/tuning")
    tuned[0].trials, tuned[0].best("ours"), tuned[0].frontier

Trial i tries the same point for every mask, and every method gets as many. Each is stored as soon as it is done; a
search that goes on, or is done again, does no trial twice. A file is only taken for a trial of the same model, facts,
method, point and code.

The selection scores are those of `helpers.unlearning.scores`: the paper's, and ours.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd

from helpers import provenance
from helpers.masks import Mask
from helpers.models import Model
from helpers.progress import progress
from helpers.splits import Split, halves
from helpers.unlearning.covariances import digest
from helpers.unlearning.edit import Edit
from helpers.unlearning.evaluation import summarize
from helpers.unlearning.finetune import finetune
from helpers.unlearning.objectives import Objective
from helpers.unlearning.scores import measure, scored
from helpers.unlearning.training import Settings
from helpers.unlearning.values import Values

GOALS = ("edit", "forget")


class TuningError(ValueError):
    """A search that cannot be made as asked."""


@dataclass(frozen=True)
class Log:
    """A number drawn so that its logarithm is uniform."""

    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))


@dataclass(frozen=True)
class Choice:
    """One of some values, each as likely."""

    options: tuple

    def draw(self, rng: random.Random):
        return rng.choice(self.options)


Space = Mapping[str, Log | Choice]
# learning rates of the tiny models; the paper searched 2e-6 to 1e-4 on models of 8 billion, and these weights
FINETUNE: Space = {"learning_rate": Log(2e-4, 2e-2), "forget_weight": Log(0.1, 5.0)}
ROME: Space = {"clamp": Log(0.3, 2.0), "ridge": Log(1e-4, 1e-1)}
MEMIT: Space = {"clamp": Log(0.3, 2.0), "preserve": Log(0.003, 1.0)}  # of λ / d_mlp at 1 a third of a fact is written, at .003 all of it
ALPHAEDIT: Space = {"clamp": Log(0.3, 2.0), "share": Log(2e-3, 0.3)}


@dataclass(frozen=True)
class Tunable:
    """A method with its mask: `make(model, split, point)` gives the edit for a point of the space (name → value).

    `identity` names whatever else decides about the result: stored trials are taken only where it is the same.
    """

    method: str
    mask: str
    make: Callable[[Model, Split, dict], Edit] = field(repr=False)
    identity: str = ""


@dataclass(frozen=True, eq=False)
class Tuned:
    """`trials`: one row a trial with its point, what `summarize` gives, the scores, and `frontier`."""

    method: str
    mask: str
    names: tuple[str, ...]
    trials: pd.DataFrame = field(repr=False)

    def best(self, score: str = "ours") -> dict:
        """The point of the trial with the highest score, the first of equals. Raises `TuningError` if all failed."""
        row = self.trials[score].idxmax() if self.trials[score].notna().any() else None
        if row is None:
            first = self.trials["error"].iloc[0]
            raise TuningError(f"{self.method}, {self.mask}: every trial failed; the first said: {first}")
        return {name: self.trials[name].tolist()[row] for name in self.names}

    @property
    def frontier(self) -> pd.DataFrame:
        """The trials that no other beats in success and in retain at once, by rising retain."""
        return self.trials[self.trials["frontier"]].sort_values("retain")


def validation(split: Split, n: int | None = None, seed: int = 0) -> Split:
    """A split made of `split.retain_train` alone: facts to practise on, of which no final number is measured.

    `n` facts to forget, by default as many as in the split, but at most a third; the others are divided 80/20 as
    ever. Facts whose relations the forget set has not are left to retain.
    """
    relations = {fact.relation.name for fact in split.forget}
    order = [i for i, fact in enumerate(split.retain_train) if fact.relation.name in relations]
    n = min(len(split.forget), len(split.retain_train) // 3) if n is None else n
    if not 0 < n <= min(len(order), len(split.retain_train) - 2):
        raise TuningError(f"validation: {n} facts to practise on are to be drawn from {len(order)} of "
                          f"{len(split.retain_train)} to retain")
    chosen = set(random.Random(f"validation-{seed}").sample(order, n))
    forget = split.retain_train[sorted(chosen)]
    rest = split.retain_train[[i for i in range(len(split.retain_train)) if i not in chosen]]
    cut = max(1, len(rest) * 4 // 5)
    first, second = halves(forget, seed)
    drawn = {"n": n, "seed": seed, "forget": [f.subject for f in forget]}
    record = {**split.record, "validation": drawn, "n_forget": n, "n_retain": len(rest)}
    return Split(f"validation of {split.spec}", seed, forget, first, second, rest[:cut], rest[cut:], record)


def points(space: Space, trials: int, seed: int = 0) -> list[dict]:
    """The points that every method and mask tries; a parameter's draws do not depend on the others in the space."""
    rng = lambda trial, name: random.Random(f"{seed}-{trial}-{name}")
    return [{name: kind.draw(rng(trial, name)) for name, kind in space.items()} for trial in range(trials)]


def tunable_finetune(mask: Mask, objective: str | Objective = "edit", settings: Settings = Settings(),
                     texts: Sequence[str] | None = None, seed: int = 0) -> Tunable:
    """`finetune` with this mask; the space may name fields of `Settings`."""
    name = objective if isinstance(objective, str) else objective.name

    def make(model: Model, split: Split, point: dict) -> Edit:
        return finetune(model, split, mask, objective, replace(settings, **point), texts, seed)

    content = [mask.digest, repr(objective), asdict(settings), None if texts is None else list(texts), seed]
    return Tunable(f"finetune {name}", mask.name, make, provenance.text_hash(json.dumps(content)))


def tunable_writing(write: Callable[..., Edit], where: int | Sequence[int] | Mask, values: Values = Values(),
                    texts: Sequence[str] | None = None, seed: int = 0, **options) -> Tunable:
    """`rome`, `memit` or `alphaedit` (`write`) at a layer, layers or a mask; the space may name fields of `Values`,
    keywords of the method, and a `layer` to write to instead. `options` are keywords that stay; with `cache` the
    covariances are computed once."""
    named = where.name if isinstance(where, Mask) else f"down {where}"

    def make(model: Model, split: Split, point: dict) -> Edit:
        own = {name: value for name, value in point.items() if name in asdict(values)}
        rest = {name: value for name, value in point.items() if name not in own}
        place = int(rest.pop("layer")) if "layer" in rest else where
        return write(model, split, place, replace(values, **own), texts, seed, **options | rest)

    place = where.digest if isinstance(where, Mask) else repr(where)
    kept = {name: repr(value) for name, value in options.items() if name != "cache"}
    content = [place, asdict(values), None if texts is None else list(texts), seed, kept]
    return Tunable(write.__name__, named, make, provenance.text_hash(json.dumps(content)))


def tune_all(model: Model, practice: Split, methods: Sequence[Tunable], space: Space, trials: int = 12, seed: int = 0,
             folder: Path | str | None = None, goal: str = "edit", **measured) -> list[Tuned]:
    """`tune` for several methods and masks, each with the same trials."""
    base = measure(model, practice, "base", "none", **measured)
    return [tune(model, practice, m, space, trials, seed, folder, goal, base=base, **measured) for m in methods]


def tune(model: Model, practice: Split, method: Tunable, space: Space, trials: int = 12, seed: int = 0,
         folder: Path | str | None = None, goal: str = "edit", *, base: tuple[pd.DataFrame, float] | None = None,
         **measured) -> Tuned:
    """Random search for one method with one mask, on a practice split (`validation`).

    `folder`: where each trial is stored; without one nothing is. `measured`: arguments of the measurement, `texts`
    (general text, held-out by default), `n_retain` (64) and others of `evaluate`. A trial whose edit fails (training
    that diverges at once) counts as one of the budget; it has no scores, and `error` says why.
    """
    if goal not in GOALS or trials < 1 or not space:
        raise TuningError(f"goal {goal!r}, {trials} trials, {len(space)} parameters: a goal is {' or '.join(GOALS)}, "
                          "and at least one is needed of the others")
    base = measure(model, practice, "base", "none", **measured) if base is None else base
    facts = [part.digest() for part in (practice.forget, practice.retain_train, practice.retain_test)]
    # the mask's name is left out: masks of the same weights share their trials
    identity = [weights_hash(model), facts, method.method, method.identity,
                {key: repr(value) for key, value in measured.items()}, provenance.package_hash("unlearning")]
    rows, tried = [], list(enumerate(points(space, trials, seed)))
    for trial, point in progress(tried, f"tuning {method.method}, {method.mask}"):
        key = provenance.text_hash(json.dumps([*identity, point], sort_keys=True))
        path = None if folder is None else Path(folder) / f"{key[:32]}.json"
        found = _read(path, key)
        if found is None:
            found = _try(model, practice, method, point, base, measured)
            if path is not None:
                named = {"key": key, "method": method.method, "mask": method.mask}
                provenance.write_json(path, {**named, "point": point, "row": found})
            found = json.loads(json.dumps(found))  # what a stored trial reads as
        rows.append({"method": method.method, "mask": method.mask, "trial": trial, **point, **found})
    table = scored(pd.DataFrame(rows), summarize(base[0], base[0]), goal)
    return Tuned(method.method, method.mask, tuple(space), table)


def _try(model: Model, practice: Split, method: Tunable, point: dict, base: tuple[pd.DataFrame, float],
         measured: dict) -> dict:
    try:
        edit = method.make(model, practice, point)
    except (ValueError, RuntimeError) as error:  # ours are ValueErrors, those of linear algebra RuntimeErrors
        return {"error": f"{type(error).__name__}: {error}"}
    with edit.applied(model):
        rows, accuracy = measure(model, practice, method.method, method.mask, **measured)
    table = summarize(rows, base[0])
    row = table[table["reading"] == "probability"].iloc[0].drop(["method", "mask", "seed", "reading"])
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}
    return {**plain, "text_accuracy": accuracy, "norm": edit.norm, "stopped": edit.record.get("stopped"), "error": None}


def weights_hash(model: Model) -> str:
    """Content of all weights."""
    return provenance.text_hash(json.dumps([(name, digest(p.detach())) for name, p in model.hf.named_parameters()]))


def _read(path: Path | None, key: str) -> dict | None:
    """A finished trial; None where there is none, or a damaged file."""
    try:
        stored = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored.get("row") if stored.get("key") == key else None
