"""The command line of sweeps.

    python -m helpers.sweep sweeps/small.yaml --dry-run           # what would run, for how long
    python -m helpers.sweep sweeps/small.yaml                     # run it; again after an interruption: the rest of it
    python -m helpers.sweep sweeps/small.yaml --engine ray        # on the Ray cluster at RAY_ADDRESS, or one started here
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from helpers import cores, provenance, store
from helpers.store import Present, StoreError
from helpers.sweep import cluster, estimates, plan
from helpers.sweep.driver import ALWAYS, Engine, Sweep, state
from helpers.sweep.execution import EXECUTED
from helpers.sweep.plan import SweepError, Task
from helpers.sweep.pool import Pool, gpus, n_workers


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (1: runs failed, 2: nothing was started, 130: interrupted)."""
    options = _arguments().parse_args(arguments)
    present = Present()
    try:
        tasks = plan.load(options.file, provenance.short_path(options.out))
        packed = store.packed(*options.rows)
        table = _table(tasks, present, packed, options)
        engine = _engine(tasks, table, options)
        if options.dry_run:
            print(table.drop(columns="todo").to_string(index=False, na_rep="", float_format="{:.3g}".format))
            print(estimates.summary(table, engine.side_by_side))
            return 0
        print(estimates.summary(table, engine.side_by_side), flush=True)
        sweep = Sweep(tasks, engine, present, _redo(options), packed)
        sweep.run()
    except (SweepError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what has finished is stored, the same command does the rest", file=sys.stderr)
        return 130
    print(_report(sweep))
    return int(any(kind.startswith("failed") for kind in sweep.counts))


def _table(tasks: Sequence[Task], present: Present, packed: Mapping[str, bool], options: argparse.Namespace) -> pd.DataFrame:
    states = [state(task, present, packed) for task in tasks]
    table = estimates.table(tasks, states, [place for place in (options.out, *options.rows) if place.exists()])
    return table.assign(todo=table["state"].isin(ALWAYS | _redo(options)))


def _redo(options: argparse.Namespace) -> set[str]:
    """The states, beside ALWAYS, that are run."""
    asked = {"stale": not options.keep_stale, "failed": options.retry_failed, "finished": False, "packed": False, "packed, stale": False}
    return {name for name, wanted in asked.items() if wanted or options.force}


def _engine(tasks: Sequence[Task], table: pd.DataFrame, options: argparse.Namespace) -> Engine:
    if options.engine == "ray":
        todo = [task for task, wanted in zip(tasks, table["todo"]) if wanted]
        cluster.require_sent(todo)
        return cluster.Cluster(options.workers or cluster.IN_FLIGHT, options.timeout, needs={task.needs for task in todo})
    devices = gpus() if any(task.params["device"] != "cpu" for task in tasks) else []
    workers = options.workers or n_workers(len(devices), max(task.needs.cpus for task in tasks), table["memory_gb"].max())
    return Pool(workers, cores.share(workers), options.timeout, devices)


def _report(sweep: Sweep) -> str:
    lines = [", ".join(f"{count} {kind}" for kind, count in sweep.counts.items()) or "nothing to do"]
    for task, error in sweep.failures:
        given = ", ".join(f"{name} {value}" for name, value in task.shown.items())
        where = provenance.short_path(task.folder / EXECUTED)
        lines.append(f"FAILED {task.notebook.stem} ({given}): {error.splitlines()[0]}\n       {where}")
    if any(kind.startswith("failed") for kind in sweep.counts):
        lines.append("--retry-failed runs them again")
    return "\n".join(lines)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers.sweep", description="Run notebooks with many parameters.")
    parser.add_argument("file", type=Path, help="the sweep, such as sweeps/small.yaml")
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--workers", type=_positive(int), help="runs side by side (default: by cores, GPUs and memory)")
    parser.add_argument("--timeout", type=_positive(float), default=240, metavar="MIN", help="minutes a run may take (default: 240)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="the store (default: runs)")
    parser.add_argument("--rows", type=Path, nargs="+", default=[], metavar="PLACE",
                        help="packed rows, files or folders such as data/results: runs that are in there are not made again, stale or not")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, for how long, and stop")
    parser.add_argument("--retry-failed", action="store_true", help="run again what failed")
    parser.add_argument("--keep-stale", action="store_true", help="leave runs in the store that older code or other inputs made as they are")
    parser.add_argument("--force", action="store_true", help="run everything again")
    return parser


def _positive(kind: type) -> type:
    def number(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
        return value

    return number


if __name__ == "__main__":
    # a batch system ends a job so: it gets the time to clear up that Ctrl-C gets
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
