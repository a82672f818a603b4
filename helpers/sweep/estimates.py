"""What a sweep will take, from runs of the same notebooks that are in the store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from helpers import store
from helpers.sweep.plan import Task

ALIKE = ("model", "profile")


def table(tasks: Sequence[Task], states: Sequence[str], out: Path) -> pd.DataFrame:
    """One row a task: run, notebook, state, what the file says of it, `minutes` and `memory_gb` (NaN: nothing like it is stored)."""
    stored = store.runs(out) if out.is_dir() else pd.DataFrame(columns=store.RUN_COLUMNS)
    stored = stored[stored["state"] == "finished"]
    rows = [{"run": task.run, "notebook": task.notebook.stem, "state": state, **task.shown} for task, state in zip(tasks, states)]
    return pd.DataFrame(rows).assign(**pd.DataFrame([_of(task, stored) for task in tasks]))


def summary(plan: pd.DataFrame, workers: int) -> str:
    """States counted; time and memory of what is left to do with so many workers."""
    counts = ", ".join(f"{count} {state}" for state, count in plan["state"].value_counts().items())
    todo = plan[plan["todo"]]
    known = todo.dropna(subset="minutes")
    said = [f"{len(plan)} runs ({counts}), {len(todo)} to do with {workers} side by side"]
    if len(known):
        said += [f"about {duration(known['minutes'].sum() * 60 / min(workers, len(known)))}"]
        said += [f"up to {known['memory_gb'].nlargest(workers).sum():.1f} GB of memory"] if known["memory_gb"].notna().any() else []
    if len(known) < len(todo):
        said += [f"no estimate for {len(todo) - len(known)}: no run of their notebook is stored"]
    return "; ".join(said)


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _of(task: Task, stored: pd.DataFrame) -> dict[str, float]:
    same = stored[stored["notebook"] == task.notebook.stem]
    close = [all(json.loads(given).get(name) == task.params.get(name) for name in ALIKE) for given in same["parameters"]]
    like = same[close] if any(close) else same
    memory = task.needs.memory_gb or like["memory_gb"].astype(float).max()
    return {"minutes": like["minutes"].astype(float).median(), "memory_gb": memory}
