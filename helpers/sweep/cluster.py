"""Notebooks as Ray tasks, on one machine or many: rows and executed notebooks come back as Ray objects, nodes share no disk.

Ray sends the project to the nodes; what they need besides is an environment with its requirements. A task whose node is lost
is run again on another one.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers import provenance
from helpers.sweep.plan import SweepError, Task
from helpers.sweep.pool import WARM, Pool

RETRIES = 3  # of a task whose node or process is lost
LEFT_BEHIND = [".git", ".venv", ".pytest_cache", ".ruff_cache", "__pycache__", "runs", "tests", "figures", "*.egg-info"]
IN_FLIGHT = 256


@dataclass(eq=False)
class Cluster:
    """Runs tasks on the Ray cluster at `address` (default: RAY_ADDRESS, else one that runs on this machine, else a new one there).

    At most `workers` tasks are handed to Ray at a time; it runs as many as the cluster has room for. `minutes`: limit of a run.
    """

    workers: int = IN_FLIGHT
    minutes: float | None = None
    address: str | None = None
    warm: bool = WARM
    side_by_side = None  # as the cluster has room; others may use it, and it may grow

    def __enter__(self) -> Cluster:
        try:
            import ray
        except ImportError:
            raise SweepError("--engine ray needs Ray: pip install -e '.[ray]'") from None
        self._ray, self._tasks = ray, {}
        # the nodes' own environment holds what is secret or particular to them
        environment = {"working_dir": str(provenance.project_root()), "excludes": LEFT_BEHIND}
        ray.init(self.address, runtime_env=environment, log_to_driver=False, ignore_reinit_error=True, logging_level="ERROR")
        self._git = provenance.git_state(provenance.project_root())
        return self

    def __exit__(self, *error: object) -> None:
        for reference in self._tasks:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()

    @property
    def free(self) -> int:
        return self.workers - len(self._tasks)

    def start(self, task: Task) -> None:
        needs = task.needs
        memory = int(needs.memory_gb * 1e9) if needs.memory_gb else None
        remote = self._ray.remote(run_there).options(num_cpus=needs.cpus, num_gpus=needs.gpus, memory=memory, max_retries=RETRIES)
        root = provenance.project_root()
        inside = task.notebook.is_relative_to(root)
        where = task.notebook.relative_to(root) if inside else Path(task.notebook.name)
        text = None if inside else task.notebook.read_text(encoding="utf-8")
        reference = remote.remote(replace(task, notebook=where), text, self.minutes, self.warm)
        self._tasks[reference] = task

    def wait(self, seconds: float) -> list[tuple[Task, str]]:
        if not self._tasks:  # all that is left to do is another sweep's at the moment
            time.sleep(seconds)
            return []
        ready, _ = self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=seconds)
        return [(task := self._tasks.pop(reference), self._collect(reference, task)) for reference in ready]

    def _collect(self, reference: Any, task: Task) -> str:
        """Put what a run left on its node into the store; returns what went wrong."""
        try:
            error, files = self._ray.get(reference)
        except self._ray.exceptions.RayError as lost:
            return f"{type(lost).__name__}: {' '.join(str(lost).split())[:500]}"
        try:
            # done.json last: with it the run counts
            for name in sorted(files, key=lambda name: name == "done.json"):
                content = self._as_here(name, files[name], task)
                provenance.write_atomic(task.folder / name, lambda path, content=content: path.write_bytes(content))
        except OSError as full:
            return f"{type(full).__name__}: {full}"
        return error

    def _as_here(self, name: str, content: bytes, task: Task) -> bytes:
        """The project on a node has no history, and its folders are not ours: those two are as if the run had been made here."""
        if name == "provenance.json":
            return json.dumps(json.loads(content) | {"git": self._git}, indent=1, ensure_ascii=False).encode() + b"\n"
        if name == "parameters.json":
            return json.dumps(dict(task.params), indent=1, ensure_ascii=False).encode() + b"\n"
        return content


def run_there(task: Task, text: str | None, minutes: float | None, warm: bool) -> tuple[str, dict[str, bytes]]:
    """On a node: run a task in a folder that ends with it; returns what went wrong and the files of the run.

    `text`: the notebook, if it does not come with the project.
    """
    with tempfile.TemporaryDirectory(prefix="mu-") as folder:
        notebook = provenance.project_root() / task.notebook
        if text is not None:
            notebook = Path(folder) / task.notebook
            notebook.write_text(text, encoding="utf-8")
        out = Path(folder) / "runs"
        here = out / task.folder.parent.name / task.folder.name
        here.mkdir(parents=True)
        gpus = [os.environ.get("CUDA_VISIBLE_DEVICES", "")] if task.needs.gpus else []
        with Pool(1, task.needs.cpus, minutes, gpus, warm) as pool:
            pool.start(replace(task, notebook=notebook, folder=here, given={**task.given, "out": str(out)}))
            while not (ended := pool.wait(60)):
                pass
        return ended[0][1], {file.relative_to(here).as_posix(): file.read_bytes() for file in here.rglob("*") if file.is_file()}
