"""Tables of a data set: from a file, a folder or the hub, with every failure turned into words that say what to do.

    rows("counterfact", HubData("azhx/counterfact", "c01c413f…", "train+test"), "", ("prompt", "subject"))

What is downloaded stays in the hub's cache. Rows are numbered from 1 in messages.
"""

from __future__ import annotations

import csv
import hashlib
import json
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from pyarrow import parquet

from helpers import provenance
from helpers.facts import FactsError


class SourceError(FactsError):
    """Data that cannot be had, or is not what it was; the message says what to do."""


@dataclass(frozen=True)
class HubData:
    """A data set on the hub.

    `revision`: a commit; None where none could be looked up when this was written. `split`: what is read of it. `instead`: what can be
    given in its place.
    """

    repo: str
    revision: str | None
    split: str = "train"
    instead: str = "a copy: {name}:<path>"


# suffix of a file → its rows
READERS = {".parquet": lambda path: parquet.read_table(path).to_pylist(), ".json": lambda path: _listed(json.loads(path.read_text("utf-8"))),
           ".jsonl": lambda path: [json.loads(line) for line in path.read_text("utf-8").splitlines() if line],
           ".csv": lambda path: list(csv.DictReader(path.open(encoding="utf-8", newline="")))}


def rows(name: str, hub: HubData | None, split: str, where: str, needed: Sequence[str]) -> list[dict]:
    """The rows of a data set of the hub, or in a local file or folder, which must have the columns needed."""
    if not where or Path(where).is_dir():
        table = dataset(name, hub, split, where)
        columns(name, table.column_names, needed)
        return _some(name, table.to_list())
    if Path(where).suffix not in READERS:
        raise SourceError(f"{name}: {where} is neither a folder nor one of {', '.join(READERS)}")
    try:
        found = READERS[Path(where).suffix](Path(where))
    except (ValueError, csv.Error) as error:
        raise SourceError(f"{name}: {where} cannot be read ({' '.join(str(error).split())[:200]})") from error
    for row in found:
        columns(name, row, needed)
    return _some(name, found)


def decoded(path: Path) -> str:
    """The text of a file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 ({error})") from error


def columns(name: str, found: Iterable[str], needed: Sequence[str]) -> None:
    """Refuses rows that lack a column."""
    missing = [column for column in needed if column not in found]
    if missing:
        raise SourceError(f"{name}: no column {', '.join(missing)}; found {', '.join(map(str, found))}. The data set has changed, or this "
                          "is another one")


def dataset(name: str, hub: HubData | None, split: str, where: str = "", streaming: bool = False):
    """A data set of the hub, or one in a local folder that is laid out like one."""
    import datasets  # takes seconds, and most facts do not need it

    with explained(name, hub):
        if where:
            return datasets.load_dataset(where, split=split)
        return datasets.load_dataset(hub.repo, revision=hub.revision, split=split, streaming=streaming)


class explained:
    """Turns what goes wrong inside into a `SourceError` that says what to do."""

    def __init__(self, name: str, hub: HubData | None):
        self.name, self.repo = name, hub.repo if hub else ""
        self.instead = hub.instead.format(name=name) if hub else ""

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, _) -> None:
        if not isinstance(error, Exception):
            return
        from datasets.exceptions import DatasetNotFoundError

        said = " ".join(str(error).split())[:300]
        if isinstance(error, DatasetNotFoundError) and "gated" in said:
            raise SourceError(f"{self.name}: {self.repo} is gated: accept its terms on its page at huggingface.co and set HF_TOKEN in the "
                              "environment") from error
        if isinstance(error, DatasetNotFoundError):
            raise SourceError(f"{self.name}: no data set {self.repo} on the hub, or it is private (set HF_TOKEN)") from error
        if isinstance(error, ConnectionError):
            raise SourceError(f"{self.name}: {self.repo} is not in the local cache, and the hub cannot be reached (offline, or "
                              f"HF_HUB_OFFLINE is set: {said}). Load it once while online, or give {self.instead}") from error
        raise SourceError(f"{self.name}: cannot be read ({said})") from error


def cache() -> Path:
    """Where downloads are kept."""
    return Path(constants.HF_HOME) / "mechanistic-unlearning"


def download(url: str, md5: str = "") -> Path:
    """A file of a web address, downloaded once."""
    path = cache() / f"{provenance.text_hash(url)[:12]}-{Path(url).name}"
    if path.is_file():
        return path
    if constants.HF_HUB_OFFLINE:
        raise SourceError(f"{url} is not in the cache, and HF_HUB_OFFLINE is set: unset it, or give a copy as <name>:<path>")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        raise SourceError(f"{url} cannot be had ({error}): give a copy as <name>:<path>") from error
    if md5 and hashlib.md5(content).hexdigest() != md5:
        raise SourceError(f"{url} is not the file that the paper used (md5 {hashlib.md5(content).hexdigest()}, not {md5})")
    provenance.write_atomic(path, lambda temporary: temporary.write_bytes(content))
    return path


def cell(name: str, number: int, row: dict, column: str) -> str:
    """A cell without the spaces around it, which must hold text; rows are numbered from 1."""
    if not isinstance(row[column], str) or not row[column].strip():
        raise SourceError(f"{name}, row {number}: {column} is {row[column]!r}, and has to be text")
    return row[column].strip()


def _some(name: str, found: list[dict]) -> list[dict]:
    if not found:
        raise SourceError(f"{name}: no rows")
    return found


def _listed(content: object) -> list[dict]:
    """What a JSON file holds, if that is a list of rows."""
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f"a list of objects is expected, not {type(content).__name__}")
    return content
