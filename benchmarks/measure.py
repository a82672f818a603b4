"""What a piece of work costs: seconds, peak memory and floating-point operations."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch.utils.flop_counter import FlopCounterMode

from helpers.progress import progress

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """Medians over the repeats of wall-clock and of CPU seconds; the largest growth of resident memory, if known.

    On a machine that does other things too, `cpu_seconds` are nearer to the truth, provided that PyTorch has one thread.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int | None


def compare(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, Cost]:
    """Run every piece of work `repeats` times, in turns, so that a change of the machine's speed hits all alike.

    The first, slower run of each is for the caller to make. Raises `ValueError` for less than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats {repeats}: at least one is needed")
    runs: dict[str, list[tuple]] = {name: [] for name in work}
    for _ in progress(range(repeats), "timing", repeats):
        for name, run in work.items():
            runs[name].append(_timed(run))
    costs = {}
    for name, found in runs.items():
        seconds, cpu_seconds, peaks = zip(*found)
        known = [peak for peak in peaks if peak is not None]
        costs[name] = Cost(statistics.median(seconds), statistics.median(cpu_seconds), max(known, default=None))
    return costs


def counted(run: Callable[[], T]) -> tuple[T, int]:
    """What `run` returns, and the floating-point operations of its matrix products (and of their gradients)."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return result, counter.get_total_flops()


def _timed(run: Callable[[], object]) -> tuple[float, float, int | None]:
    _tidy()
    before = _mark_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return seconds, cpu_seconds, None if before is None else _memory("VmHWM") - before


def _tidy() -> None:
    """Give freed memory back to the system, where it would hide how much the next run takes."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError):  # not every C library has it
            ctypes.CDLL(None).malloc_trim(0)


def _mark_memory() -> int | None:
    """Resident bytes now, from where the peak is counted again; None where the system has no such counter."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _memory("VmRSS")
    except OSError:
        return None


def _memory(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
