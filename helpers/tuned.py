"""Hyper-parameters found by the same search for every mask, kept in `data/tuned`.

    python -m helpers.tuned tiny-llama3 --facts athletes --forget first-64 --masks "lookup,causal tracing,everything" --jobs 2
    python -m helpers.tuned tiny-llama3 --forget answer-basketball --objective unlearn

The masks are those that `localization.choices` makes for the facts to forget. All of them try the same points of learning rate
and forget weight, on practice facts of which no final number is measured (`practice`). Every trial is stored as soon as it is
done, in `<folder>/trials`, so that a killed search goes on and a repeated one does nothing; all trials of a mask are in
`<folder>/<model>/<task>/<mask>.parquet`. The point with the highest score `ours` (`unlearning.scores`) goes into a file of its own,
`data/tuned/<model>/<task>/<mask>.yaml`, with how it was found; `helpers.presets` reads it, and names the tasks. The trials go
into `data/trials/<model>-<task>-masks.csv`, where those of other masks stay; `read_trials` reads it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import yaml

from helpers import metrics, presets, provenance, sources, splits
from helpers.facts import load
from helpers.localization.choices import NAMES, choose, is_window
from helpers.masks import Mask
from helpers.models import Model, load_model
from helpers.splits import Split, halves
from helpers.unlearning import tuning
from helpers.unlearning.training import Settings
from helpers.unlearning.tuning import FINETUNE, Log, Tuned, TuningError

HEADER = "# Written by `python -m helpers.tuned`: the best of as many trials as other masks got, on practice facts.\n"
N_TEXTS = 50  # general texts that a trial is read on
MOST_READ = 64  # practice facts of a whole answer that a trial is read on
TRIALS = presets.TUNED.parent / "trials"
SHOWN = ["mask", "trial", *FINETUNE, "forget", "edit", "retain", "mcq_forget", "mcq_edit", "mcq_retain", "text_loss", "collapsed",
         "success", "harm", "ours"]  # of a trial, in the table of all


def practice(split: Split) -> tuple[Split, dict]:
    """Facts to practise on, and arguments of the measurement.

    Usually `tuning.validation`. Where all facts with one answer are to go (spec section 1.2), others cannot stand in for
    them: then half of `attack_train` is trained on and at most 64 facts of its other half are read, and the facts to retain are
    divided anew. `attack_test` and `retain_test`, of which final numbers come, stay out of it.
    """
    if not split.spec.startswith("answer-"):
        return tuning.validation(split), {}
    first, second = halves(split.attack_train, split.seed)
    if not len(first) or not len(second) or len(split.retain_train) < 2:
        raise TuningError(f"forget={split.spec!r} has {len(split.attack_train)} facts to practise on, and {len(split.retain_train)} to retain")
    cut = max(1, len(split.retain_train) * 4 // 5)
    kept, read = split.retain_train[:cut], split.retain_train[cut:]
    again = {"forget": [fact.subject for fact in first], "read": [fact.subject for fact in second[:MOST_READ]]}
    record = {**split.record, "practice": again, "n_forget": len(first), "n_retain": len(split.retain_train)}
    done = replace(split, spec=f"practice of {split.spec}", forget=first, retain_train=kept, retain_test=read, record=record)
    return done, {"forget": second[:MOST_READ]}


def search(model: Model, split: Split, masks: Sequence[Mask], objective: str = "edit", trials: int = 12, seed: int = 0,
           folder: Path | str = "runs/tuning", settings: Settings = Settings(), rates: Log = FINETUNE["learning_rate"],
           texts: str = "") -> list[Tuned]:
    """The same trials for each of the masks; those found in `folder` are not made again. `texts`: see `sources.texts`."""
    drawn, measured = practice(split)
    taught = None
    if texts:
        taught, held_out = sources.text_sets(texts, n_held_out=N_TEXTS)
        measured |= {"texts": held_out}
    methods = [tuning.tunable_finetune(mask, objective, settings, taught, seed) for mask in masks]
    goal = "edit" if objective == "edit" else "forget"
    return tuning.tune_all(model, drawn, methods, {**FINETUNE, "learning_rate": rates}, trials, seed, Path(folder) / "trials", goal, **measured)


def keep(model: str, task: str, found: Sequence[Tuned], settings: Settings, about: dict, kept: Path = presets.TUNED) -> None:
    """Write the best points, and `settings` where they are not the defaults, each into the file of its mask.

    `about` is noted beside each point, with score and number of trials. Raises `TuningError` where every trial of a mask failed.
    """
    fixed = {name: value for name, value in asdict(settings).items() if value != getattr(Settings(), name)}
    for tuned in found:
        best = {name: float(f"{value:.4g}") for name, value in tuned.best().items()}
        said = {"score": round(float(tuned.trials["ours"].max()), 4), "trials": len(tuned.trials), **about}
        place = presets.tuned_file(model, task, tuned.mask, kept)
        provenance.write_text(place, HEADER + yaml.safe_dump({**fixed, **best, "provenance": said}, sort_keys=True, allow_unicode=True))


def trials_file(model: str, task: str, folder: Path = TRIALS) -> Path:
    """Where the trials of all masks are kept, whether or not there are any."""
    return Path(folder) / f"{Path(presets.identify(model) or model).name}-{task}-masks.csv".replace(" ", "-")


def keep_trials(model: str, task: str, trials: pd.DataFrame, folder: Path = TRIALS) -> Path:
    """Write trials to their file in one step, to four digits; those of masks that are not among them stay there."""
    path, table = trials_file(model, task, folder), trials.reindex(columns=SHOWN)
    if path.is_file():
        there = pd.read_csv(path)
        table = pd.concat([there[~there["mask"].isin(table["mask"])], table], ignore_index=True)
    provenance.write_atomic(path, lambda temporary: table.to_csv(temporary, index=False, float_format="%.4g"))
    return path


def read_trials(model: str, task: str, masks: Sequence[str], folder: Path = TRIALS) -> pd.DataFrame:
    """The trials kept for these masks, in their order, with `chosen`, the one with the highest score; no rows where there are none."""
    path = trials_file(model, task, folder)
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=SHOWN)
    table = table[table["mask"].isin(masks)].sort_values("mask", key=lambda mask: mask.map(list(masks).index), kind="stable")
    best = table.dropna(subset="ours").groupby("mask")["ours"].idxmax()
    return table.assign(chosen=table.index.isin(best)).reset_index(drop=True)


def other_searches(model: str, task: str, trials: int, rates: Sequence[float], masks: Sequence[str], kept: Path = presets.TUNED) -> list[str]:
    """Other masks of the task whose kept settings come from a search of another extent, a line each: edits at such masks are no fair comparison."""
    mine = f"{trials} trials at rates {' to '.join(f'{rate:g}' for rate in rates)}"
    own = {presets.tuned_file(model, task, name, kept) for name in masks}
    others = sorted(set(presets.tuned_file(model, task, "lookup", kept).parent.glob("*.yaml")) - own)
    return [f"this search: {mine}, but {place.stem} was tuned by {how}" for place in others if (how := presets.extent(place)) != mine]


def _group(options: argparse.Namespace, names: Sequence[str]) -> tuple[str, str, list[Tuned], Settings, dict]:
    """The search for some of the masks, from the names of model and facts on: one process's work."""
    model = load_model(options.model, options.dtype, options.device)
    known = metrics.known(model, load(options.facts))
    known = known.edited_to(options.to) if options.to else known
    split = splits.split(known, options.forget)
    key, task = presets.identify(model.name) or model.name, presets.task_of(known.name, split.spec, options.objective)
    for line in other_searches(key, task, options.trials, options.rates, options.masks, options.kept):
        print(line, file=sys.stderr, flush=True)
    chosen = choose(model, known, split, names, lookup=options.lookup, seed=options.seed)
    settings = Settings(steps=options.steps, batch=options.batch, chunk=options.chunk, recompute=options.recompute)
    found = search(model, split, list(chosen.masks.values()), options.objective, options.trials, options.seed, options.folder, settings,
                   Log(*options.rates), options.texts)
    for tuned in found:
        path = Path(options.folder) / Path(key).name / task / f"{tuned.mask}.parquet"
        provenance.write_atomic(path, lambda temporary, table=tuned.trials: table.to_parquet(temporary, index=False))
    about = {"facts": f"{known.name} {split.spec}", "facts_digest": known.digest(), "learning_rates": list(options.rates),
             "seed": options.seed, "code": provenance.package_hash("unlearning")[:12]}
    return key, task, found, settings, about


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers.tuned", description="The same search of hyper-parameters for every mask.")
    parser.add_argument("model", help="tiny-*, a local path or a hub id")
    parser.add_argument("--objective", choices=["edit", "unlearn"], default="edit")
    parser.add_argument("--masks", default=",".join(name for name in NAMES if name != "windows"), help="names of localization.choices, separated by commas")
    parser.add_argument("--facts", default="athletes", help="athletes, world or a CSV file")
    parser.add_argument("--forget", default="first-64", help="first-<n> or answer-<word>")
    parser.add_argument("--to", help="one edit answer for all facts, such as golf")
    parser.add_argument("--trials", type=int, default=12, help="as many for every mask")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each for some of the masks")
    parser.add_argument("--steps", type=int, default=Settings().steps, help="optimizer steps of a trial")
    parser.add_argument("--batch", type=int, default=presets.SMALL.batch, help="examples of each kind a step; the paper took 64")
    parser.add_argument("--chunk", type=int, default=Settings().chunk, help="rows of a training pass, fewer where memory is short")
    parser.add_argument("--recompute", action="store_true", help="run blocks again in the backward pass: less memory, more time")
    parser.add_argument("--texts", default="", help="general text: pile, a file, or nothing for the tiny models' own kind")
    parser.add_argument("--rates", type=float, nargs=2, default=(FINETUNE["learning_rate"].low, FINETUNE["learning_rate"].high),
                        metavar=("LOW", "HIGH"), help="learning rates to draw from")
    parser.add_argument("--lookup", type=lambda text: tuple(map(int, text.split(","))), help="lookup MLPs chosen by hand, 2,3,4")
    parser.add_argument("--seed", type=int, default=0, help="of points, edits, localization and random masks")
    parser.add_argument("--device", help="cpu, cuda … (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--folder", type=Path, default=Path("runs/tuning"), help="where trials are stored")
    parser.add_argument("--kept", type=Path, default=presets.TUNED, help="folder where the best points are kept")
    parser.add_argument("--out", type=Path, default=TRIALS, help="folder for the table of all trials")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2: something asked for is not there)."""
    options = _arguments().parse_args(arguments)
    names = options.masks = list(dict.fromkeys(name.strip() for name in options.masks.split(",") if name.strip()))
    try:
        unknown = [name for name in names if name not in NAMES and not is_window(name)]
        if unknown or not names or options.jobs < 1:
            raise TuningError(f"masks {', '.join(unknown) or '(none)'}, {options.jobs} jobs: there are {', '.join(NAMES)}, and at least one job is needed")
        groups = [names[i::options.jobs] for i in range(min(options.jobs, len(names)))]
        if len(groups) == 1:
            done = [_group(options, names)]
        else:
            with ProcessPoolExecutor(len(groups), mp_context=multiprocessing.get_context("spawn")) as pool:
                done = list(pool.map(_group, [options] * len(groups), groups))
        for model, task, found, settings, about in done:
            keep(model, task, found, settings, about, options.kept)
            keep_trials(model, task, pd.concat([t.trials for t in found]), options.out)
            print("\n".join(f"{model}, {task}, {t.mask}: {t.best()}, score {t.trials['ours'].max():.3f}" for t in found))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
