"""What a sweep will take, from runs of the same notebooks that are in the store or packed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from helpers import store
from helpers.sweep.plan import Task

ALIKE = ["model", "profile"]


def table(tasks: Sequence[Task], states: Sequence[str], places: Sequence[Path]) -> pd.DataFrame:
    """One row a task: run, notebook, state, what the file says of it, `minutes` and `memory_gb` (NaN: nothing like it is stored).

    `places`: folders of runs and packed files from which it is known what runs take.
    """
    stored = pd.concat([store.runs(place) for place in places] or [pd.DataFrame(columns=store.RUN_COLUMNS)], ignore_index=True)
    # files that older code packed do not say what their runs took
    stored = stored[stored["state"] == "finished"].dropna(subset="minutes")
    rows = [{"run": task.run, "notebook": task.notebook.stem, "state": state, **task.shown} for task, state in zip(tasks, states)]
    return pd.DataFrame(rows).assign(**pd.DataFrame([_of(task, stored) for task in tasks]))


def summary(plan: pd.DataFrame, side_by_side: int | None) -> str:
    """States counted; time and memory of what is left to do with so many runs at once (None: unknown, then those of one after another)."""
    counts = ", ".join(f"{count} {state}" for state, count in plan["state"].value_counts().items())
    todo = plan[plan["todo"]]
    minutes, memory = todo["minutes"].dropna(), todo["memory_gb"].dropna()
    at_once = side_by_side or 1
    how, time, space = (f"with {side_by_side} side by side", "", "") if side_by_side else ("as the cluster has room", " one after another", " a run")
    said = [f"{len(plan)} runs ({counts}), {len(todo)} to do {how}"]
    if len(minutes):
        said += [f"about {duration(minutes.sum() * 60 / min(at_once, len(minutes)))}{time}"]
    if len(memory):
        said += [f"up to {memory.nlargest(at_once).sum():.1f} GB of memory{space}"]
    if len(minutes) < len(todo):
        said += [f"no estimate of time for {len(todo) - len(minutes)}: no stored run of their notebook says how long it took"]
    return "; ".join(said)


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _of(task: Task, stored: pd.DataFrame) -> dict[str, float]:
    same = stored[stored["notebook"] == task.notebook.stem]
    close = same[(same[ALIKE] == [str(task.params.get(name, "")) for name in ALIKE]).all(axis=1)]
    like = same if close.empty else close
    memory = task.needs.memory_gb or like["memory_gb"].astype(float).max()
    return {"minutes": like["minutes"].astype(float).median(), "memory_gb": memory}
