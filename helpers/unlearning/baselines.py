"""Methods that are tuned with equal effort and then compared: what each may vary, and the trials of all of them on disk.

    python -m helpers.unlearning.baselines tiny-llama3 --task edit --trials 12 --jobs 2      # writes data/trials/
    entrants = editing(model, {"lookup": flu, "everything": all_of_it})
    found = read(model, "athletes", "edit", entrants) or search(model, validation(split), entrants, trials=2)
    edit = entrants["MEMIT"].make(model, split, found["MEMIT"].best())

Three tasks: `edit` writes the edit answers, by fine-tuning and by closed forms (`editing`); `unlearn` lowers the true
answers, by several objectives (`unlearning`); `delete` forgets by deleting single weights, found by learned masks
(`deleting`). Every entrant gets as many trials, drawn at random from its own space, on practice facts of which no final
number is measured (`tuning.validation`), and is judged by `scores`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch

from helpers import metrics, provenance, splits
from helpers.facts import DATA, Facts, load
from helpers.localization.choices import choose
from helpers.masks import Mask
from helpers.models import Model, load_model
from helpers.splits import Split
from helpers.unlearning.alphaedit import alphaedit
from helpers.unlearning.deletions import available, candidates, delete, ladder
from helpers.unlearning.edit import Edit
from helpers.unlearning.evaluation import summarize
from helpers.unlearning.lora import finetune_lora
from helpers.unlearning.memit import memit
from helpers.unlearning.rome import rome
from helpers.unlearning.scores import measure, scored
from helpers.unlearning.training import Settings
from helpers.unlearning.tuning import (
    ALPHAEDIT,
    FINETUNE,
    MEMIT,
    ROME,
    Choice,
    Log,
    Space,
    Tunable,
    Tuned,
    TuningError,
    tunable_finetune,
    tunable_writing,
    tune,
    validation,
    weights_hash,
)
from helpers.unlearning.values import Values
from helpers.unlearning.weight_masks import Learning, learn

FOLDER = DATA / "trials"
GOALS = {"edit": "edit", "unlearn": "forget", "delete": "forget"}  # task → what its trials are judged by
UNLEARNING = ("unlearn", "ascent", "graddiff", "npo", "simnpo", "rmu")
WAYS = {
    "explicit, published": Learning("explicit", "published"),
    "explicit, towards": Learning("explicit", "towards"),
    "explicit, hard": Learning("explicit", "towards", hard=True),
    "clamped, published": Learning("clamped", "published"),
    "clamped, towards": Learning("clamped", "towards"),
}
# learning rates of the two parametrisations: to be deleted a mask moves by 1, a weight by its own size
RATES = {"explicit": Log(0.1, 30.0), "clamped": Log(1e-3, 0.2)}
PRICE = Log(3.0, 1000.0)  # β, where it is a price: for all candidates, in nats. Else it is the published number
SHARES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1)  # of the candidates: the rungs that a trial of a weight mask may end on
READ, LOST = 32, 0.5  # retained facts that a rung is read on; with this share of them right or less no higher rung is tried


@dataclass(frozen=True)
class Entrant:
    """A method with what is searched of it (`space`), and a point of that space to begin with where nothing was searched."""

    tunable: Tunable = field(repr=False)
    space: Space
    default: dict

    def make(self, model: Model, split: Split, point: dict | None = None) -> Edit:
        """Its edit of the facts to forget, at a point of its space."""
        return self.tunable.make(model, split, self.default if point is None else point)


def editing(model: Model, masks: Mapping[str, Mask], settings: Settings = Settings(), values: Values = Values(contexts=2),
            texts: Sequence[str] | None = None, seed: int = 0, cache: Path | str | None = None) -> dict[str, Entrant]:
    """The editing methods, by name. `masks`: "lookup", where the localized ones write, and "everything".

    ROME writes into one of the lookup layers, which is searched too, because under a post-norm not every MLP can write a
    new value (`helpers.unlearning.values`). MEMIT and AlphaEdit write into all of them.
    """
    lookup, everything = masks["lookup"], masks["everything"]
    layers = tuple(lookup.layers)
    tuned = {"learning_rate": settings.learning_rate, "forget_weight": settings.forget_weight}
    writing = lambda write: tunable_writing(write, lookup, values, texts, seed, cache=cache)
    entrants = {
        "fine-tuning, lookup": Entrant(tunable_finetune(lookup, "edit", settings, texts, seed), FINETUNE, tuned),
        "fine-tuning, everything": Entrant(tunable_finetune(everything, "edit", settings, texts, seed), FINETUNE, tuned),
        "LoRA, everything": Entrant(tunable_lora(everything, settings, texts, seed), FINETUNE, tuned),
        "ROME": Entrant(writing(rome), ROME | {"layer": Choice(layers)}, {"clamp": 0.7, "ridge": 1e-3, "layer": layers[len(layers) // 2]}),
        "MEMIT": Entrant(writing(memit), MEMIT, {"clamp": 0.7, "preserve": 0.03}),
        "AlphaEdit": Entrant(writing(alphaedit), ALPHAEDIT, {"clamp": 0.7, "share": 0.05}),
    }
    return _named(entrants)


def unlearning(where: Mask, objectives: Sequence[str] = UNLEARNING, settings: Settings = Settings(), texts: Sequence[str] | None = None,
               seed: int = 0, space: Space = FINETUNE) -> dict[str, Entrant]:
    """Fine-tuning of one mask with each of these objectives, by their names."""
    default = {name: getattr(settings, name) for name in space}
    return _named({name: Entrant(tunable_finetune(where, name, settings, texts, seed), space, default) for name in objectives})


def deleting(where: Mask, objective: str = "unlearn", settings: Settings = Settings(), texts: Sequence[str] | None = None,
             seed: int = 0, shares: Sequence[float] = SHARES) -> dict[str, Entrant]:
    """Learned weight masks, by WAYS. An edit is the best rung of the mask's ladder (`best_rung`) over these shares of the candidates."""
    entrants = {}
    for name, way in WAYS.items():
        base = replace(way, training=settings)
        space = {"learning_rate": RATES[way.parametrisation], "forget_weight": FINETUNE["forget_weight"]}
        space |= {"strength": PRICE} if way.regulariser == "towards" else {}
        rate = (10.0 if way.regulariser == "towards" else 0.3) * (1.0 if way.parametrisation == "explicit" else 0.005)
        default = {"learning_rate": rate, "forget_weight": 0.3, "strength": 30.0}
        entrants[name] = Entrant(_tunable_mask(base, where, objective, texts, seed, shares), space, {key: default[key] for key in space})
    return _named(entrants)


def at(base: Learning, point: Mapping[str, float]) -> Learning:
    """How a mask is learned at a point of its space."""
    rest = {name: value for name, value in point.items() if name != "strength"}
    return replace(base, strength=point.get("strength", base.strength), training=replace(base.training, **rest))


def best_rung(model: Model, split: Split, importance: Mapping[str, torch.Tensor], ns: Sequence[int], record: Mapping, goal: str = "forget") -> Edit:
    """The deletion of n weights, out of `ns`, that the score `ours` prefers on the split's own facts.

    How many deletions a model stands differs by orders of magnitude, so a mask is not judged at one n. Numbers above those
    that may be deleted are left out. Raises `SelectionError` if none is left.
    """
    there = available(importance)
    masks = ladder(model, importance, [n for n in ns if n <= there] or [min(max(there, 1), ns[0])], "weight mask")
    base, rows = measure(model, split, "base", "none", n_retain=READ)[0], []
    for chosen in masks:
        with delete(model, chosen).applied(model):
            found, accuracy = measure(model, split, "weight mask", chosen.name, n_retain=READ)
        rows.append(summarize(found, base).assign(text_accuracy=accuracy))
        if not found["top_true"][found["group"] == "retain"].mean() > LOST:  # nor would more deletions help
            break
    table = pd.concat(rows)
    table = scored(table[table["reading"] == "probability"].reset_index(drop=True), summarize(base, base), goal)
    return delete(model, masks[int(table["ours"].fillna(-1).idxmax())], record)


def tunable_lora(mask: Mask, settings: Settings, texts: Sequence[str] | None = None, seed: int = 0) -> Tunable:
    """LoRA of a mask, of the default rank; the space may name fields of `Settings`."""
    make = lambda model, split, point: finetune_lora(model, split, "edit", replace(settings, **point), texts, seed, mask=mask)
    content = [mask.digest, asdict(settings), None if texts is None else list(texts), seed]
    return Tunable("lora", mask.name, make, provenance.text_hash(json.dumps(content)))


def search(model: Model, practice: Split, entrants: Mapping[str, Entrant], trials: int = 12, seed: int = 0,
           folder: Path | str | None = None, goal: str = "edit", **measured) -> dict[str, Tuned]:
    """As many trials for each entrant; those in `folder` are not made again (see `tuning.tune`)."""
    base = measure(model, practice, "base", "none", **measured)
    return {name: tune(model, practice, entrant.tunable, entrant.space, trials, seed, folder, goal, base=base, **measured)
            for name, entrant in entrants.items()}


def file(model: Model, facts: str, task: str, folder: Path = FOLDER) -> Path:
    """Where the trials of a task are kept, whether or not there are any."""
    return Path(folder) / f"{Path(model.name).name}-{facts}-{task}.csv"


def keep(model: Model, facts: str, task: str, found: Mapping[str, Tuned], folder: Path = FOLDER) -> Path:
    """Write these trials to their `file`, in one step; those of other methods, for the same weights, stay there."""
    path, own = file(model, facts, task, folder), weights_hash(model)[:16]
    table = pd.concat([tuned.trials for tuned in found.values()], ignore_index=True).assign(weights=own)
    if path.is_file():
        there = pd.read_csv(path)
        table = pd.concat([there[(there["weights"] == own) & ~there["method"].isin(found)], table], ignore_index=True)
    provenance.write_atomic(path, lambda temporary: table.to_csv(temporary, index=False, float_format="%.6g"))
    return path


def read(model: Model, facts: str, task: str, entrants: Mapping[str, Entrant], folder: Path = FOLDER) -> dict[str, Tuned] | None:
    """The trials kept for exactly these weights and for facts of this name; None if there are none, or not for every entrant at its place."""
    path = file(model, facts, task, folder)
    if not path.is_file():
        return None
    table = pd.read_csv(path)
    table, found = table[table["weights"] == weights_hash(model)[:16]], {}
    for name, entrant in entrants.items():
        trials = table[(table["method"] == name) & (table["mask"] == entrant.tunable.mask)].reset_index(drop=True)
        if trials.empty or not set(entrant.space) <= set(trials):
            return None
        found[name] = Tuned(name, entrant.tunable.mask, tuple(entrant.space), trials)
    return found


def _named(entrants: dict[str, Entrant]) -> dict[str, Entrant]:
    """Each tunable under the name of its entrant."""
    return {name: replace(entrant, tunable=replace(entrant.tunable, method=name)) for name, entrant in entrants.items()}


def _tunable_mask(base: Learning, where: Mask, objective: str, texts: Sequence[str] | None, seed: int, shares: Sequence[float]) -> Tunable:
    def make(model: Model, split: Split, point: dict) -> Edit:
        learned = learn(model, split, where, objective, at(base, point), texts, seed)
        ns = [max(1, round(share * where.n_parameters)) for share in shares]
        return best_rung(model, split, learned.importance, ns, learned.record, "edit" if objective == "edit" else "forget")

    content = [where.digest, asdict(base), objective, None if texts is None else list(texts), seed, list(shares)]
    return Tunable("weight mask", where.name, make, provenance.text_hash(json.dumps(content)))


def _prepare(options: argparse.Namespace) -> tuple[Model, Facts, Split, dict[str, Entrant]]:
    model = load_model(options.model, options.dtype, options.device)
    known = metrics.known(model, load(options.facts))
    split = splits.split(known, options.forget)
    chosen = choose(model, known, split, ["lookup", "everything"], lookup=options.lookup, seed=options.seed).masks
    settings = Settings(steps=options.steps, batch=options.batch)
    if options.task == "edit":
        return model, known, split, editing(model, chosen, settings, seed=options.seed, cache=options.folder / "covariances")
    if options.task == "unlearn":
        return model, known, split, unlearning(chosen["lookup"], settings=settings, seed=options.seed)
    return model, known, split, deleting(candidates(model, chosen["lookup"]), settings=settings, seed=options.seed)


def _search(options: argparse.Namespace, names: Sequence[str] | None = None) -> tuple[Model, Facts, dict[str, Tuned]]:
    """The search for some entrants, from the name of the model on: one process's work."""
    model, known, split, entrants = _prepare(options)
    names = _named_methods(options, entrants) if names is None else names
    chosen = {name: entrants[name] for name in names}
    found = search(model, validation(split), chosen, options.trials, options.seed, options.folder / "trials", GOALS[options.task])
    return model, known, found


def _named_methods(options: argparse.Namespace, entrants: Mapping[str, Entrant]) -> list[str]:
    names = list(entrants) if options.methods is None else [name.strip() for name in options.methods.split(";")]
    if unknown := [name for name in names if name not in entrants]:
        raise TuningError(f"no method {unknown[0]!r} for task {options.task!r}; there are {'; '.join(entrants)}")
    return names


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers.unlearning.baselines", description="As many trials for each method.")
    parser.add_argument("model", help="tiny-*, a local path or a hub id")
    parser.add_argument("--task", choices=GOALS, default="edit")
    parser.add_argument("--methods", help="of the task, separated by semicolons; trials kept for the others stay (default: all)")
    parser.add_argument("--facts", default="athletes", help="athletes, world or a CSV file")
    parser.add_argument("--forget", default="first-64", help="the facts to edit, of which no trial is made")
    parser.add_argument("--trials", type=int, default=12, help="as many for every method")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each for some of the methods")
    parser.add_argument("--steps", type=int, default=Settings().steps, help="optimizer steps of a trial")
    parser.add_argument("--batch", type=int, default=32, help="examples of each kind a step; the paper took 64")
    parser.add_argument("--lookup", type=lambda text: tuple(map(int, text.split(","))), help="lookup MLPs chosen by hand, 2,3,4")
    parser.add_argument("--seed", type=int, default=0, help="of points, edits and localization")
    parser.add_argument("--device", help="cpu, cuda … (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--folder", type=Path, default=Path("runs/tuning"), help="where single trials are stored")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the table of all trials goes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2: something asked for is not there)."""
    options = _arguments().parse_args(arguments)
    try:
        if options.jobs < 1:
            raise TuningError(f"{options.jobs} jobs: at least one is needed")
        if options.jobs > 1:
            names = _named_methods(options, _prepare(options)[-1])
            with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
                list(pool.map(_search, [options] * options.jobs, [names[i::options.jobs] for i in range(options.jobs)]))
        model, known, found = _search(options)  # what the processes stored is read
        path = keep(model, known.name, options.task, found, options.out)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for name, tuned in found.items():
        print(f"{name}: {tuned.best()}, score {tuned.trials['ours'].max():.3f}")
    print(provenance.short_path(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
