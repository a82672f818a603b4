"""One run in a process of its own: the executed notebook goes into the folder of the run, beside its rows."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterable, Mapping
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil

from helpers import notebooks, provenance
from helpers.sweep import kernels

EXECUTED = "notebook.ipynb"
LOG = "log.txt"  # what the run and its kernel said outside the notebook, such as why they crashed


def attempt(notebook: Path, folder: Path, given: Mapping[str, Any], env: Mapping[str, str], warm: bool,
            result: connection.Connection) -> None:
    """Execute a notebook with the parameters `given` and send what went wrong, empty if nothing did.

    `warm`: fork the kernel from this process. `env`: what it finds in its environment.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C in the terminal is for the driver alone
    os.environ.update(env)
    _redirect(folder / LOG)
    manager = kernels.manager(kernels.Waiting()) if warm else notebooks.LocalKernel
    threading.Thread(target=_follow_parent, daemon=True).start()
    error = notebooks.execute(notebook, folder / EXECUTED, given, manager)
    if not error and not (folder / "done.json").exists():
        error = f"the notebook ended, but no run.finish() in it wrote to {provenance.short_path(folder)}"
    result.send(error)


def descendants(pid: int) -> list[psutil.Process]:
    """What a process has started, and what that has, in whatever groups and sessions; less what has outlived its own parent."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """End processes, some of which may have ended."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _redirect(log: Path) -> None:
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def _follow_parent() -> None:
    """End, with the kernel and all it has started, when the process that started this one is gone, however it went."""
    connection.wait([multiprocessing.parent_process().sentinel])
    kill(descendants(os.getpid()))
    os._exit(1)
