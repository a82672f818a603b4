"""What a sweep is to run: a YAML file of notebooks and parameters, checked whole before anything starts.

    - notebook: 02_fact_lookup_circuit                    # a stem, a number in quotes, or a path beside this file
      fixed: {profile: quick}                             # the same in every run
      grid: {facts: [athletes, world], seed: [0, 1, 2]}   # every combination
    - notebook: 03_localization
      list:                                               # each of these, times the grid if there is one
      - {facts: athletes, n_facts: 32}
      - {facts: world, n_facts: 64}
      needs: {cpus: 4, gpus: 1, memory_gb: 24}            # of one run

`needs` is what Ray reserves, and what bounds the number of runs side by side on one machine. Where results go is no
parameter: `--out` says so.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from helpers import notebooks, parameters, provenance, runs

PLACES = ("out", "figures")


class SweepError(ValueError):
    """A sweep cannot be run as written; one line a problem, each with what is allowed."""


class RepeatedKey(Exception):
    """A mapping names a key twice; the message says which, and where."""


class Loader(yaml.SafeLoader):
    """Refuses a repeated key, of which YAML's own loader takes the last without a word."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise RepeatedKey(f"line {line}: `{key.value}` is given already in line {lines[name]}")
            lines[name] = line
        return node


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Needs(Strict):
    """What one run takes of a machine. Unstated memory is that of stored runs, where there are any."""

    cpus: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    memory_gb: Annotated[float, Field(gt=0)] | None = None


class Entry(Strict):
    notebook: str
    fixed: dict[str, Any] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    each: Annotated[list[dict[str, Any]], Field(min_length=1, alias="list")] = [{}]
    needs: Needs = Needs()

    def combinations(self) -> Iterator[dict[str, Any]]:
        for chosen in self.each:
            for values in itertools.product(*self.grid.values()):
                yield self.fixed | chosen | dict(zip(self.grid, values))


@dataclass(frozen=True, eq=False)
class Task:
    """One run to be made. `shown`: what the file says of it; `given`: that and where it goes; `params`: with the defaults."""

    notebook: Path
    shown: Mapping[str, Any]
    given: Mapping[str, Any]
    params: Mapping[str, Any]
    folder: Path
    needs: Needs = Needs()

    @property
    def run(self) -> str:
        return self.folder.name


def load(file: Path | str, out: str = "runs") -> list[Task]:
    """The runs of a sweep file in order, a repeated one once; `out` as in a notebook's parameters. Raises SweepError."""
    file = Path(file)
    try:
        raw = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise SweepError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SweepError(f"{file} cannot be read: it is not UTF-8 (byte {error.start})") from None
    except RepeatedKey as error:
        raise SweepError(f"{file.name}, {error}") from None
    except yaml.YAMLError as error:
        raise SweepError(f"{file.name} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, list) or not raw:
        raise SweepError(f"{file.name}: expected a list of entries with the keys {', '.join(_keys())}")
    tasks: dict[Path, Task] = {}
    problems: list[str] = []
    for number, item in enumerate(raw, start=1):
        try:
            for task in _tasks(item, file.parent, out):
                tasks.setdefault(task.folder, task)
        except ValueError as error:
            problems += [f"{file.name}, entry {number}: {line}" for line in str(error).splitlines()]
    if problems:
        raise SweepError("\n".join(problems))
    return list(tasks.values())


def _tasks(item: Any, beside: Path, out: str) -> Iterator[Task]:
    entry = _entry(item)
    notebook = _notebook(entry.notebook, beside)
    try:
        declared = parameters.declared_by(notebook)
    except (ValueError, KeyError, SyntaxError) as error:
        raise SweepError(f"{notebook.name} cannot be read as a notebook with parameters: {error}") from None
    for given in entry.combinations():
        if places := [name for name in PLACES if name in given]:
            raise SweepError(f"`{places[0]}` is not for a sweep to vary: say where results go with --out")
        params = parameters.validate(declared, given | {"out": out})
        folder = runs.folder(notebook.stem, params)
        yield Task(notebook, given, given | {"out": out}, params.model_dump(), folder, entry.needs)


def _entry(item: Any) -> Entry:
    if not isinstance(item, dict):
        raise SweepError(f"expected a mapping with the keys {', '.join(_keys())}, not {item!r}")
    try:
        entry = Entry.model_validate(item)
    except ValidationError as error:
        raise SweepError("\n".join(map(_describe, error.errors()))) from None
    given = [*entry.fixed, *entry.grid, *{name for chosen in entry.each for name in chosen}]
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise SweepError(f"`{twice[0]}` is given in more than one of fixed, grid and list")
    return entry


def _notebook(name: str, beside: Path) -> Path:
    if name.endswith(".ipynb"):
        path = (beside / name).resolve()
        if not path.is_file():
            raise SweepError(f"no notebook at {provenance.short_path(path)}")
        return path
    try:
        (path,) = notebooks.select([name], provenance.project_root() / "notebooks")
    except ValueError as error:
        raise SweepError(str(error)) from None
    return path


def _keys(model: type[BaseModel] = Entry) -> Sequence[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _describe(problem: Mapping[str, Any]) -> str:
    *place, name = map(str, problem["loc"])
    key = ".".join([*place, name])
    if problem["type"] == "extra_forbidden":
        allowed = _keys(Needs if place else Entry)
        close = difflib.get_close_matches(name, allowed, n=1)
        guess = f", did you mean `{close[0]}`?" if close else ""
        return f"unknown key `{key}`{guess} (allowed: {', '.join(allowed)})"
    got = "" if problem["type"] == "missing" else f" (got {problem['input']!r})"
    return f"`{key}`: {problem['msg'][0].lower()}{problem['msg'][1:]}{got}"
