"""Interrupts (Ctrl-C, or the SIGTERM of a batch system) that wait for what must not be cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handled_as_before() -> Iterator[None]:
    """Handlers of ours are there again afterwards: a package that is set up within may have put its own in their place."""
    ours = {number: handler for number in INTERRUPTS if callable(handler := signal.getsignal(number))}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in ours.items():
                signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """What interrupts within comes after it: a process that has just been started is then known to whoever has to end it.

    Handlers run in the main thread alone, so elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: handler for number in INTERRUPTS if (handler := signal.getsignal(number)) is not None}  # None: not for Python to restore
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)
