"""Progress bars that are quiet when nobody watches, and a clock; apart from `helpers.runs`, so that computing needs no notebook packages."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

HEADLESS_VARIABLE = "MU_HEADLESS"
# set by Jupyter's server and by VS Code in the kernels they start, not by papermill
INTERACTIVE_VARIABLES = ("JPY_SESSION_NAME", "VSCODE_PID")


def is_headless() -> bool:
    """Whether nobody watches, as under papermill; the variable MU_HEADLESS (1 or 0) overrides."""
    if HEADLESS_VARIABLE in os.environ:
        return os.environ[HEADLESS_VARIABLE] != "0"
    return not (sys.stderr.isatty() or any(name in os.environ for name in INTERACTIVE_VARIABLES))


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Writes down under `name` how many seconds the block took."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """A progress bar around a loop, silent when headless, so that batch logs stay readable."""
    if is_headless():
        return iterable
    from tqdm.auto import tqdm

    return tqdm(iterable, desc=description, total=total)
