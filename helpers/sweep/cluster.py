"""Notebooks as Ray tasks, on one machine or many: rows and executed notebooks come back as Ray objects, nodes share no disk.

Ray sends the project to the nodes; what they need besides is an environment with its requirements. A task whose node is lost
is run again on another one.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from helpers import provenance
from helpers.sweep.interrupts import handled_as_before
from helpers.sweep.plan import Needs, SweepError, Task
from helpers.sweep.pool import WARM, Pool

RETRIES = 3  # of a task whose node or process is lost
LEFT_BEHIND = [".git", ".venv", ".pytest_cache", ".ruff_cache", "__pycache__", "runs", "tests", "figures", "*.egg-info"]
IN_FLIGHT = 256
INPUTS = ("model", "facts", "texts")  # parameters that may name files
ANSWER = 10.0  # seconds in which a cluster must answer


@dataclass(eq=False)
class Cluster:
    """Runs tasks on the Ray cluster at `address` (default: RAY_ADDRESS, else one that runs on this machine, else a new one there).

    At most `workers` tasks are handed to Ray at a time; it runs as many as the cluster has room for. `minutes`: limit of a run.
    `needs`: of the tasks to come; entering raises SweepError where no node is large enough for one of them, or no cluster answers.
    """

    workers: int = IN_FLIGHT
    minutes: float | None = None
    address: str | None = None
    needs: Collection[Needs] = ()
    warm: bool = WARM
    side_by_side = None  # as the cluster has room; others may use it, and it may grow

    def __enter__(self) -> Cluster:
        try:
            import ray
        except ImportError:
            raise SweepError("--engine ray needs Ray: pip install -e '.[ray]'") from None
        self._ray, self._tasks = ray, {}
        self._connect()
        try:
            require_room(map(_resources, self.needs), [node["Resources"] for node in ray.nodes() if node["Alive"]])
        except SweepError:
            ray.shutdown()
            raise
        self._git = provenance.git_state(provenance.project_root())
        return self

    def _connect(self) -> None:
        where = self.address or os.environ.get("RAY_ADDRESS", "")
        # the nodes' own environment holds what is secret or particular to them
        environment = {"working_dir": str(provenance.project_root()), "excludes": LEFT_BEHIND}
        try:
            _require_answer(where)
            with handled_as_before():
                self._ray.init(self.address, runtime_env=environment, log_to_driver=False, ignore_reinit_error=True, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:300]
            raise SweepError(f"no Ray cluster at {where or 'this machine'}: {why} (RAY_ADDRESS says where; unset, one is started here)") from None

    def __exit__(self, *error: object) -> None:
        for reference in self._tasks:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()

    @property
    def free(self) -> int:
        return self.workers - len(self._tasks)

    def start(self, task: Task) -> None:
        needs = _resources(task.needs)
        options = {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"], "memory": needs["memory"] or None}
        remote = self._ray.remote(run_there).options(**options, max_retries=RETRIES)
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


def require_sent(tasks: Iterable[Task]) -> None:
    """Raise SweepError for a model, facts or texts that are given as a path and do not come to the nodes with the project."""
    given = {(name, str(task.params.get(name, "")), task.notebook.parent) for task in tasks for name in INPUTS}
    if missing := sorted({f"{name} {value}" for name, value, beside in given if value and not _is_sent(value, beside)}):
        left = ", ".join(LEFT_BEHIND)
        raise SweepError(f"--engine ray sends the project to the nodes (without {left}), and these are not in it: {'; '.join(missing)}. "
                         "Copy them into the project, such as into data/")


def require_room(wanted: Iterable[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise SweepError for a run that is larger than any node: Ray would wait for a larger one for ever. Both by Ray's names of resources."""
    for needs in wanted:
        asked = {name: amount for name, amount in needs.items() if amount}
        covered = lambda node, asked=asked: sum(min(1, node.get(name, 0) / amount) for name, amount in asked.items())
        largest = max(nodes, key=covered, default={})
        if covered(largest) < len(asked):
            raise SweepError(f"a run needs {_size(needs)}, and no node of the Ray cluster is that large; the largest has {_size(largest)}")


def _is_sent(value: str, beside: Path) -> bool:
    """Whether what a parameter names is there on a node: by name, or as a path in the project."""
    given = Path(value.rpartition(":")[2]).expanduser()  # "counterfact:<path>" reads a local copy
    root = provenance.project_root().resolve()
    path = next((place for place in ((beside / given).resolve(), root / given) if place.exists()), None)
    if path is None:  # the name of something bundled, or on the hub
        return not given.is_absolute()
    inside = path.is_relative_to(root)
    return inside and not any(fnmatch(part, left) for part in path.relative_to(root).parts for left in LEFT_BEHIND)


def _require_answer(address: str) -> None:
    """Raise OSError where nothing listens at host:port, which Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # and not "auto" or "local"
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()


def _resources(needs: Needs) -> dict[str, float]:
    """Needs by Ray's names; memory in bytes."""
    return {"CPU": needs.cpus, "GPU": needs.gpus, "memory": int((needs.memory_gb or 0) * 1e9)}


def _size(resources: Mapping[str, float]) -> str:
    cpus, gpus, memory = (resources.get(name, 0) for name in ("CPU", "GPU", "memory"))
    return f"{cpus:g} cores, {gpus:g} GPUs" + (f" and {memory / 1e9:.1f} GB of memory" if memory else "")


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
