"""The runs of a folder or of a packed file, one record each: where a run came from, what became of it, what it took.

A run is `finished`, `failed`, `unfinished`, or `unreadable`: one of its files is torn (by a crash of the machine) or is not what a run
writes. Such a run is named and left out; the others around it are read as ever.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow.parquet as pq
from pydantic import BaseModel, TypeAdapter, ValidationError

T = TypeVar("T")

ORIGIN = dict.fromkeys(["profile", "notebook", "commit", "code", "started", "machine"], "VARCHAR")
COSTS = dict.fromkeys(["minutes", "memory_gb"], "DOUBLE")
RUN_COLUMNS = ["run", "model", *ORIGIN, "state", "error", *COSTS, "parameters", "uses", "folder"]
# columns that older packed files lack
LATER = {"profile": "''", "parameters": "'{}'", "minutes": "CAST(NULL AS DOUBLE)", "memory_gb": "CAST(NULL AS DOUBLE)"}
OLD = ".old"  # ends the folder of a finished run that is being run again


class StoreError(ValueError):
    """There is no store at a place, or it has no such column; the message says what there is."""


class Commit(BaseModel):
    commit: str = ""
    dirty: bool = False


class Made(BaseModel):
    """What is needed of a run's `provenance.json`."""

    notebook: str
    started: str
    code: str
    git: Commit | None
    platform: str
    device: str
    threads: int
    uses: dict[str, str]


class Done(BaseModel):
    """What is needed of a run's `done.json`."""

    code: str
    uses: dict[str, str]
    minutes: float | None = None
    memory_gb: float | None = None


class Failed(BaseModel):
    """What is needed of a run's `failed.json`."""

    error: str
    code: str


def of_place(place: Path) -> list[dict[str, Any]]:
    """The runs of a packed file, or of a folder of runs, in order. Raises StoreError."""
    return _of_pack(place) if place.is_file() else list(_of_folder(place))


def of_run(folder: Path) -> dict[str, Any] | None:
    """RUN_COLUMNS of the run in a folder, and its `stamp`; None where no run has started."""
    at = stamp(folder)  # before what it stands for is read
    record = dict.fromkeys(RUN_COLUMNS, "") | dict.fromkeys(COSTS) | {"run": folder.name.removesuffix(OLD), "folder": str(folder), "stamp": at}
    try:
        found = _read(folder)
    except (OSError, ValueError) as error:
        found = {"notebook": folder.parent.name, "state": "unreadable", "error": str(error), "parameters": "{}", "uses": "{}"}
    return record | found if found else None


def is_readable(folder: Path) -> bool:
    """Whether a folder has no run with a torn file."""
    run = of_run(folder)
    return run is None or run["state"] != "unreadable"


def failure(folder: Path) -> Failed | None:
    """Why the run in a folder failed; None where it did not. Raises ValueError where that cannot be read."""
    return _said(folder / "failed.json", Failed)


def stamp(folder: Path) -> tuple[int, int] | None:
    """Changes whenever the run in a folder finishes; None where it has not."""
    try:
        found = (folder / "done.json").stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _of_folder(out: Path) -> Iterator[dict[str, Any]]:
    if not out.is_dir():
        raise StoreError(f"no runs at {out}: give a folder that a sweep or a notebook wrote to, or a file made by pack")
    for file in sorted(out.glob("*/*/provenance.json")):
        folder = file.parent
        record = of_run(folder)
        replaced = folder.suffix == OLD and (folder.with_suffix("") / "done.json").exists()
        if record and not replaced:
            yield record


def _of_pack(file: Path) -> list[dict[str, Any]]:
    try:
        with duckdb.connect() as connection:
            rows = connection.read_parquet(str(file))
            needed = [*ORIGIN, *COSTS, "parameters", "uses"]
            columns = [f"{LATER[name]} AS {name}" if name in LATER and name not in rows.columns else name for name in needed]
            runs = rows.query("rows", f"SELECT run, any_value(model) AS model, {', '.join(columns)} FROM rows GROUP BY ALL ORDER BY run").fetchall()
    except duckdb.Error as error:
        raise StoreError(f"{file} is no file made by pack: {str(error).splitlines()[0]}") from None
    same = {"state": "finished", "error": "", "folder": ""}
    return [same | dict(zip(["run", "model", *needed], run)) for run in runs]


def _read(folder: Path) -> dict[str, Any] | None:
    """What the files of a run say of it; None where it has not started. Raises OSError, or ValueError for a file that no run writes."""
    made, done, failed = _said(folder / "provenance.json", Made), _said(folder / "done.json", Done), failure(folder)
    given = _said(folder / "parameters.json", dict[str, Any]) or {}
    if made is None:
        return None
    if done:
        _require_whole(folder / "results.parquet")
    return {
        "model": str(given.get("model", "")),
        "profile": str(given.get("profile", "")),
        "notebook": made.notebook,
        "commit": made.git.commit + "-dirty" * made.git.dirty if made.git else "",
        "code": made.code,
        "started": made.started,
        "machine": f"{made.platform}, {made.device}, {made.threads} threads",
        "state": "finished" if done else "failed" if failed else "unfinished",
        "error": failed.error if failed and not done else "",
        "minutes": done.minutes if done else None,
        "memory_gb": done.memory_gb if done else None,
        "parameters": json.dumps(given),
        "uses": json.dumps((done or made).uses, sort_keys=True),
    }


def _said(path: Path, kind: type[T]) -> T | None:
    """What a JSON file of a run says; None where there is none. Raises ValueError."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{path.name}: {' '.join([*map(str, problem['loc']), problem['msg']])}") from None


def _require_whole(rows: Path) -> None:
    """Raise ValueError for a Parquet file that is torn; a run may have none."""
    try:
        pq.read_metadata(rows)
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ValueError(f"{rows.name}: {error}") from None
