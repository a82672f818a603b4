"""What a run in a sweep costs beyond its computation, and how many runs an hour go through the pool.

    python -m benchmarks.sweep                          # on an idle machine
    python -m benchmarks.sweep --runs 8 --workers 1 2

The same cell of a notebook is timed bare, in a process that has everything imported and with all cores, and in sweeps: with
kernels forked warm and with new ones. Every run must record the number that the bare cell gives. What a run takes is
the sweep's time over its number of runs; what a sweep spends once, on importing for all its runs, stands by itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import nbformat
import pandas as pd
import torch
from nbformat.v4 import new_code_cell, new_notebook

from benchmarks.report import judge, save
from helpers import cores, provenance
from helpers.store import Present
from helpers.sweep import plan
from helpers.sweep.driver import Sweep
from helpers.sweep.pool import WARM, Pool

BAR, AIM = 8.0, 4.0  # seconds of a run beyond its computation
STEM = "90_benchmark"
PARAMETERS = """profile: str = "quick"  # quick, standard or full
seed: int = 0  # tells the runs apart
out: str = "runs"  # folder for rows
device: str = "cpu"  # where to compute
model: str = "tiny-llama3"  # a bundled name, a folder or a hub id
facts: str = "athletes"  # athletes or world
repeats: int = 3  # how often the questions are asked"""
START = f'from helpers import runs\nrun = runs.start("{STEM}", globals())'
IMPORTS = """from helpers import metrics, prompts, tracing
from helpers.facts import load
from helpers.models import load_model"""
COMPUTE = """lm = load_model(model)
asked = prompts.build(lm.tokenizer, load(facts)[:256], "cloze")
for _ in range(repeats):
    value = float(metrics.scores(tracing.read(lm, asked).logits, asked)["p_true"].mean())"""
FINISH = 'run.record([{"value": value}])\nrun.finish()'


def bare(given: dict, repeats: int = 3) -> tuple[float, float]:
    """(seconds of the computation, its value) with everything imported, on all cores; the median of `repeats`."""
    torch.set_num_threads(cores.n_cores())
    seconds, names = [], dict(given)
    exec(IMPORTS, names)
    for _ in range(repeats + 1):
        began = time.perf_counter()
        exec(COMPUTE, names)
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:]), names["value"]  # the first one imports on


def timed(folder: Path, given: dict, workers: int, runs: int, warm: bool) -> tuple[float, set[float]]:
    """(seconds of a sweep, the values of its runs)."""
    cells = list(map(new_code_cell, [PARAMETERS, START, IMPORTS, COMPUTE, FINISH]))
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells), folder / f"{STEM}.ipynb")
    provenance.write_json(folder / "sweep.yaml", [{"notebook": f"{STEM}.ipynb", "fixed": given, "grid": {"seed": list(range(runs))}}])
    began = time.perf_counter()
    pool = Pool(workers, cores.share(workers), warm=warm)
    made = Sweep(plan.load(folder / "sweep.yaml", str(folder / "out")), pool, Present(folder), redo=["finished", "stale"])
    made.run()
    seconds = time.perf_counter() - began
    if made.counts != {"done": runs}:
        raise RuntimeError(f"the sweep did not run whole: {dict(made.counts)} {[error for _, error in made.failures]}")
    return seconds, {value for task in made.tasks for value in pd.read_parquet(task.folder / "rows.parquet")["value"]}


def measure(given: dict, workers: Sequence[int], runs: int) -> pd.DataFrame:
    """One row a way of starting kernels and number of workers, with `runs` runs for each worker."""
    alone, expected = bare(given)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for warm in [True, False] if WARM else [False]:
            first, _ = timed(Path(folder), given, 1, 1, warm)  # imports for all that follow
            for count in workers:
                seconds, values = timed(Path(folder), given, count, runs * count, warm)
                if max(abs(value - expected) for value in values) > 1e-6:
                    raise RuntimeError(f"runs gave {values}, the bare computation {expected}")
                each = seconds / runs
                rows.append({"kernels": "forked" if warm else "new", "workers": count, "runs": runs * count, "first run": first,
                             "seconds a run": each, "bare": alone, "overhead": each - alone, "runs an hour": 3600 * runs * count / seconds,
                             "verdict": judge(each - alone, BAR, AIM) if count == 1 and warm == WARM else ""})
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama3")
    parser.add_argument("--facts", default="athletes")
    parser.add_argument("--repeats", type=int, default=10, help="how much a run computes")
    parser.add_argument("--runs", type=int, default=5, help="runs for each worker")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, 2, cores.n_cores()}))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/sweep.json"))
    args = parser.parse_args(arguments)
    given = {"model": args.model, "facts": args.facts, "repeats": args.repeats}
    table = measure(given, args.workers, args.runs)
    save(args.out, {"what a run costs": table}, **given, runs=args.runs)


if __name__ == "__main__":
    main()
