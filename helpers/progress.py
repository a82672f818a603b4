"""Progress bars that are quiet when nobody watches; apart from `helpers.runs`, so that computing needs no notebook packages."""

import os
import sys
from collections.abc import Iterable
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


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """A progress bar around a loop, silent when headless, so that batch logs stay readable."""
    if is_headless():
        return iterable
    from tqdm.auto import tqdm

    return tqdm(iterable, desc=description, total=total)
