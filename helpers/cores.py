"""Cores of this machine, and processes that keep to their share of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(processes: int) -> int:
    """Threads of each of so many processes side by side: equally many, at least one."""
    return max(1, n_cores() // processes)


def threads(number: int) -> dict[str, str]:
    """Environment of a process whose packages are to take so many threads, each of them."""
    return dict.fromkeys(THREAD_VARIABLES, str(number))


@contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes started within; afterwards all is as before."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
