"""Small notebooks and sweeps for the tests of `helpers.sweep`, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from helpers import provenance
from helpers.store import Present
from helpers.sweep import plan
from helpers.sweep.driver import Sweep
from helpers.sweep.pool import Pool

PARAMETERS = """profile: str = "quick"  # quick, standard or full
seed: int = 0  # of every random choice
out: str = "runs"  # folder for rows and figures
device: str = "cpu"  # auto, cpu, mps or cuda
dtype: str = "auto"  # auto, float32 or bfloat16
model: str = ""  # none
facts: str = ""  # none
notes: str = ""  # a folder in which to leave a mark"""
FINISH = "run.finish()"
# a file a run, with the process id of its kernel
MARK = "import os, pathlib\npathlib.Path(run.params.notes, f'{run.seed}-{os.getpid()}').touch()"
HANG = "import time\ntime.sleep(600)"
RESULT = """import pandas as pd
run.result(pd.DataFrame({"seed": run.seed, "fact": ["a", "b"], "measure": "forget_edit top1", "value": [run.seed, run.seed + 0.5]}))"""


def notebook(folder: Path, stem: str, *body: str) -> Path:
    sources = [PARAMETERS, f'from helpers import runs\nrun = runs.start("{stem}", globals())', *body]
    cells = list(map(new_code_cell, sources))
    cells[0].metadata["tags"] = ["parameters"]
    path = folder / f"{stem}.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def sweep_file(folder: Path, *entries: dict) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(list(entries)))
    return path


def entry(stem: str, **keys) -> dict:
    return {"notebook": f"{stem}.ipynb", **keys}


def sweep(file: Path, redo: tuple[str, ...] = ("stale",), workers: int = 2, **options) -> Sweep:
    """A sweep after its run in this process, with the store beside the file."""
    made = Sweep(plan.load(file, str(file.parent / "out")), Pool(workers, **options), Present(file.parent), redo)
    made.run()
    return made


def command(file: Path, *options: str) -> subprocess.Popen:
    """The same by the command line, in a process group of its own as in a terminal."""
    arguments = [sys.executable, "-m", "helpers.sweep", str(file), "--out", str(file.parent / "out"), *options]
    environment = {**os.environ, "PYTHONPATH": str(provenance.project_root())}
    # in the background of a shell, where tests may run, Ctrl-C would be ignored
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, preexec_fn=listen)


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def marks(folder: Path) -> list[tuple[int, int]]:
    """(seed, process id of the kernel) of each run that left a mark."""
    return sorted(tuple(map(int, path.name.split("-"))) for path in folder.iterdir())


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def failure(task: plan.Task) -> str:
    return json.loads((task.folder / "failed.json").read_text())["error"]


def executed(task: plan.Task) -> nbformat.NotebookNode:
    return nbformat.read(task.folder / "notebook.ipynb", as_version=4)
