"""Keeps a store while an engine runs what is left to do: nothing twice, nothing lost.

Each run is locked while it is under way, so several sweeps may share a store. A run that older code finished is set aside
and stays readable until the new one has finished. A failed run leaves `failed.json` beside its notebook with the traceback.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from filelock import FileLock, Timeout

from helpers import listing, provenance, runs
from helpers.listing import OLD
from helpers.progress import is_headless
from helpers.store import Present
from helpers.sweep.estimates import duration
from helpers.sweep.execution import EXECUTED
from helpers.sweep.plan import Task

LOCKS = ".locks"
ALWAYS = frozenset({"new", "unreadable"})  # states of runs that have no rows to keep
PATIENCE = 1.0  # seconds between looks at what runs, and at locks that others hold


class Engine(Protocol):
    """Where tasks run. Leaving its `with` block ends what still runs. `side_by_side`: how many at once, None where that is not known before."""

    side_by_side: int | None

    @property
    def free(self) -> int: ...

    def start(self, task: Task) -> None: ...

    def wait(self, seconds: float) -> list[tuple[Task, str]]: ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: object) -> None: ...


def state(task: Task, present: Present, packed: Mapping[str, bool] = MappingProxyType({})) -> str:
    """What the store holds of a run: `finished`, `stale` (by other code or inputs), `failed` (by this code), `unreadable` or `new`.

    `packed`: runs whose rows are kept elsewhere, and whether they are stale there (`store.packed`). What the store has not finished by
    this code is then `packed`, or `packed, stale`.
    """
    code = present.code(task.notebook.stem, task.notebook.parent)
    readable = listing.is_readable(task.folder)
    if readable and runs.is_current(task.folder, code, present.digest):
        return "finished"
    if task.run in packed:
        return "packed, stale" if packed[task.run] else "packed"
    if not readable:
        return "unreadable"
    if (task.folder / "done.json").exists():
        return "stale"
    failed = listing.failure(task.folder)
    return "failed" if failed and failed.code == code else "new"


@dataclass
class Sweep:
    """Tasks to be run where the store has them in a state of `redo`, or of ALWAYS in any case.

    `counts` and `failures` say in the end what became of them; a run that needs no doing counts under its state.
    """

    tasks: Sequence[Task]
    engine: Engine
    present: Present
    redo: Collection[str] = ("stale",)
    packed: Mapping[str, bool] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Task, str]] = field(default_factory=list)

    def run(self) -> None:
        """Run all there is to do. KeyboardInterrupt (of Ctrl-C, or SIGTERM) ends what is under way, and the store stays as it is."""
        self._waiting, self._locks, self._began = list(self.tasks), {}, time.monotonic()
        try:
            with self.engine:
                while self._waiting or self._locks:
                    for task in list(self._waiting):
                        if not self.engine.free:
                            break
                        self._begin(task)
                    for task, error in self.engine.wait(PATIENCE):
                        self._conclude(task, error)
                    self._show()
        finally:
            for lock in self._locks.values():
                lock.release()
            if not is_headless():
                print(file=sys.stderr)

    def _begin(self, task: Task) -> None:
        """Start a task, or settle it, or leave it waiting while another sweep is at it."""
        try:
            lock = FileLock(_lock_file(task))
            lock.acquire(blocking=False)
        except Timeout:
            return
        except OSError as error:  # a full disk, a folder that may not be written
            return self._settle(task, "failed", f"{type(error).__name__}: {error}")
        self._locks[task] = lock
        # looked at only now: another sweep may have run it since
        found = state(task, self.present, self.packed)
        if found not in ALWAYS and found not in self.redo:
            return self._settle(task, f"{found} before")
        try:
            _set_aside(task.folder)
            self._waiting.remove(task)
            self.engine.start(task)
        except OSError as error:
            self._conclude(task, f"{type(error).__name__}: {error}")

    def _conclude(self, task: Task, error: str) -> None:
        folder = task.folder
        if error:
            failed = {"error": error, "at": datetime.now(UTC).isoformat(timespec="seconds"),
                      "code": self.present.code(task.notebook.stem, task.notebook.parent)}
            try:
                (folder / "done.json").unlink(missing_ok=True)
                provenance.write_json(folder / "failed.json", failed)
            except OSError as full:
                error = f"{error} (and it could not be noted: {full})"
        else:
            shutil.rmtree(folder.with_name(folder.name + OLD), ignore_errors=True)
        self._settle(task, "failed" if error else "done", error)

    def _settle(self, task: Task, became: str, error: str = "") -> None:
        if task in self._waiting:
            self._waiting.remove(task)
        if task in self._locks:
            self._locks.pop(task).release()
        self.counts[became] += 1
        if error:
            self.failures.append((task, error))

    def _show(self) -> None:
        if is_headless():
            return
        done, running, waiting = self.counts["done"] + self.counts["failed"], len(self._locks), len(self._waiting)
        left = ""
        if done:
            rate = (time.monotonic() - self._began) / done
            left = f", about {duration(rate * (running / 2 + waiting))} left"
        print(f"\r\033[K{running} running, {self.counts['done']} done, {self.counts['failed']} failed, {waiting} to do{left}",
              end="", file=sys.stderr, flush=True)


def _set_aside(folder: Path) -> None:
    """Make room for a run; what a finished one left there stays readable."""
    if (folder / "done.json").exists():
        old = folder.with_name(folder.name + OLD)
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("failed.json", EXECUTED):
        (folder / name).unlink(missing_ok=True)


def _lock_file(task: Task) -> Path:
    locks = task.folder.parents[1] / LOCKS
    locks.mkdir(parents=True, exist_ok=True)
    return locks / f"{task.folder.name}.lock"
