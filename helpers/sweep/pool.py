"""Notebooks side by side on this machine, each in a process group of its own, so that any of them can be killed whole.

On Linux the processes are forked from one that has the heavy packages imported (`warm`); elsewhere they start cold, because
forking after such imports is not safe there.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from helpers import cores
from helpers.notebooks import LONGEST_SOCKET_FOLDER
from helpers.progress import HEADLESS_VARIABLE
from helpers.sweep import execution
from helpers.sweep.interrupts import held_back
from helpers.sweep.plan import Task

WARM = sys.platform == "linux"
USUAL_GB = 2.0  # of main memory, for a run on a tiny model


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, found without importing torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def n_workers(n_gpus: int, cpus: int, memory_gb: float) -> int:
    """How many runs of so many cores and so much memory (NaN: unknown) fit side by side; one a GPU if there are any."""
    needed = memory_gb if memory_gb == memory_gb else USUAL_GB
    return max(1, min(n_gpus or cores.n_cores() // cpus, int(psutil.virtual_memory().available / 1e9 / needed)))


@dataclass(eq=False)
class Running:
    """A run under way. `slot` is the lowest number that was free: it says which GPU is its own."""

    task: Task
    slot: int
    process: BaseProcess
    result: connection.Connection
    deadline: float


class Pool:
    """Runs tasks in processes, at most `workers` at a time, each with `threads` threads and `minutes` of time.

    `gpus`: names for CUDA_VISIBLE_DEVICES; worker number i sees the i-th alone (empty: what this process sees).
    Leaving the `with` block kills what still runs.
    """

    def __init__(self, workers: int, threads: int = 1, minutes: float | None = None, gpus: Sequence[str] = (), warm: bool = WARM) -> None:
        self.workers, self.threads, self.minutes, self.gpus, self.warm = workers, threads, minutes, list(gpus), warm
        self._running: list[Running] = []
        self._context = multiprocessing.get_context("forkserver" if warm else "spawn")

    def __enter__(self) -> Pool:
        self._sockets = _socket_folder()
        return self

    def __exit__(self, *error: object) -> None:
        with held_back():
            for running in list(self._running):
                self._end(running)
            shutil.rmtree(self._sockets, ignore_errors=True)

    @property
    def side_by_side(self) -> int:
        return self.workers

    @property
    def free(self) -> int:
        """How many more tasks can be started now."""
        return self.workers - len(self._running)

    def start(self, task: Task) -> None:
        """Start a run; the first waits for the packages to be imported, and an interrupt waits with it."""
        with held_back():
            self._running.append(self._started(task))

    def _started(self, task: Task) -> Running:
        slot = min(set(range(self.workers)) - {running.slot for running in self._running})
        env = self._environment(slot)
        result, theirs = self._context.Pipe(duplex=False)
        arguments = (task.notebook, task.folder, task.given, env, self.warm, theirs)
        process = self._context.Process(target=execution.attempt, args=arguments)
        if self.warm:
            self._context.set_forkserver_preload(["helpers.sweep.warm"])
        with cores.environment(env):  # threads are set before anything is imported
            process.start()
        theirs.close()
        deadline = time.monotonic() + (self.minutes * 60 if self.minutes else float("inf"))
        return Running(task, slot, process, result, deadline)

    def wait(self, seconds: float) -> list[tuple[Task, str]]:
        """Tasks that ended within so many seconds, each with what went wrong (empty if nothing did). Returns at the first."""
        now = time.monotonic()
        until = min([now + seconds, *(running.deadline for running in self._running)])
        ready = connection.wait([running.result for running in self._running], max(0, until - now))
        ended = []
        for running in list(self._running):
            if running.result in ready:
                error = _error(running)
            elif time.monotonic() >= running.deadline:
                error = f"stopped after {self.minutes:g} minutes, the time limit of a run"
            else:
                continue
            self._end(running)
            ended.append((running.task, error))
        return ended

    def _end(self, running: Running) -> None:
        with held_back():
            _kill(running.process)
            running.result.close()
            self._running.remove(running)

    def _environment(self, slot: int) -> dict[str, str]:
        """Variables of a run that are set before it imports anything."""
        search = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]))
        own = {"PYTHONPATH": search, "JUPYTER_RUNTIME_DIR": self._sockets, HEADLESS_VARIABLE: "1",
               # matplotlib may be imported before the kernel that draws is there to choose
               "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {}
        return own | gpu | cores.threads(self.threads)


def _socket_folder() -> str:
    """A new folder that is short enough for kernels to have their sockets in it; on macOS the usual one is not."""
    name = "mu-12345678"  # of as many characters as it will have
    fits = len(os.path.join(tempfile.gettempdir(), name)) <= LONGEST_SOCKET_FOLDER
    return tempfile.mkdtemp(prefix="mu-", dir=None if fits or os.name != "posix" else "/tmp")


def _error(running: Running) -> str:
    try:
        return running.result.recv()
    except EOFError:
        running.process.join()
        code = running.process.exitcode
        return "the process of the run " + (f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}")


def _kill(process: BaseProcess) -> None:
    """End a run with all it has started."""
    started = execution.descendants(process.pid)  # asked while it lives: later they are nobody's
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, OSError):  # Windows has no groups; or it has not made its own yet, or is gone
        process.kill()
    execution.kill(started)
    process.join()
    process.close()
