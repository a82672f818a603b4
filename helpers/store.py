"""The store: what runs left on disk, as one table. Parquet per run, read with DuckDB.

    rows = read("runs")                                        # a pandas table, one value a row: SCHEMA
    rows = read("runs", "data/results/reference.parquet", model="tiny-llama3", attack=["none", "worst"])
    relation("runs").aggregate("method, localization, avg(value)").df()      # the same rows, for SQL
    runs("runs")                                               # one row a run, also those that failed or never ended
    runs("data/results/reference.parquet")                     # the same of packed runs

    python -m helpers.store pack runs data/results/reference.parquet        # all finished runs in one file, to commit or send

Columns: `run` (its id), `model`, `facts`, `n` (facts edited), `seed`, `localization`, `layers`, `method`,
`attack`, `setting`, `fact`, `measure`, `value` as `helpers.results` and `data/claims.yaml` explain them; then where the value comes
from: `profile` of the run ("" where it has none, or older code packed it), `notebook`, `commit` (ends in "-dirty" where files
differed from it), `code` (hash), `started` (UTC), `machine`, `stale`.

Rows come from the `results.parquet` of finished runs (`run.result` in a notebook). A run's id says nothing of code, data or weights:
it hashes the notebook's name and the parameters, and nothing else. What the run was made with stands in its `done.json` (a hash of the
code, and one of each file it used) and is compared with what is there now. Rows that older code made, or other data or weights,
are read all the same, with `stale` set: it is for the reader of the rows to leave them out. A folder of runs has one version of
each run: the same parameters run again replace the older rows, as soon as the new run has ended well under a sweep, at its start
otherwise. To keep older rows, `pack` them, with the parameters of each run and the `minutes` and `memory_gb` that it took: `runs` says
those, empty where they are unknown (in files that older code packed, too). Of a run that is in several sources, the one started last counts.
`read` is safe while runs are made: writers replace whole files, and a run that starts anew during the reading is not taken.
A run with a torn file (a crash of the machine) is left out with a warning, `unreadable` in `runs`, and made again by a sweep.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from helpers import claims, listing, provenance
from helpers.listing import COSTS, OLD, ORIGIN, RUN_COLUMNS, StoreError

ROWS = dict.fromkeys([*claims.COLUMNS, "layers", "setting"], "VARCHAR") | {"n": "BIGINT", "seed": "BIGINT", "value": "DOUBLE"}
SCHEMA = ROWS | ORIGIN | {"stale": "BOOLEAN"}
OF_A_RUN = ORIGIN | COSTS | {"parameters": "VARCHAR", "uses": "VARCHAR"}  # of packed rows, which have no other place to keep it
PACKED = [*ROWS, *OF_A_RUN]
Listed = list[tuple[Path, list[dict[str, Any]]]]  # places with records of their runs
LISTINGS = 5
DECIMALS = 3  # of packed values
# rows repeat those of other runs: one page of one group must hold them all for the compression to see it, which more than halves the file;
# Brotli makes it a tenth smaller than zstd does, and is read as fast
COMPRESSION = {"compression": "brotli", "compression_level": 11, "row_group_size": 2**26, "data_page_size": 2**30, "max_rows_per_page": 2**30}
# values are counted in thousandths, byte by byte: a tenth less again
NUMBERS = {"store_decimal_as_integer": True, "use_dictionary": [name for name in PACKED if name != "value"],
           "column_encoding": {"value": "BYTE_STREAM_SPLIT"}}


class Present:
    """Code and inputs as they are now, each hashed once: hundreds of runs share a notebook and its weights."""

    def __init__(self, notebooks: Path | None = None) -> None:
        folder = notebooks or provenance.project_root() / "notebooks"
        self.digest = cache(provenance.content_hash)
        self.code = cache(lambda notebook, place=folder: provenance.code_hash(notebook, place))

    def is_stale(self, notebook: str, code: str, uses: str) -> bool:
        """Whether a run's code or inputs (JSON: path → content hash) have changed. Inputs that are not on this machine cannot tell."""
        gone = provenance.changed(json.loads(uses), self.digest)
        return code != self.code(notebook) or any((provenance.project_root() / path).exists() for path in gone)


def read(*sources: Path | str, notebooks: Path | None = None, **where: Any) -> pd.DataFrame:
    """The rows of finished runs in SCHEMA, those whose columns have the value, or one of the values, in `where`.

    `sources`: folders of runs, of files made by `pack` or of both, single such files; none give no rows. Of a run that is in several, the one started last counts.
    `notebooks`: their folder, if it is not the project's. Raises StoreError.
    """
    return _table(sources, notebooks, SCHEMA, where).to_pandas()


def relation(*sources: Path | str, notebooks: Path | None = None, **where: Any) -> duckdb.DuckDBPyRelation:
    """The rows of `read` as a DuckDB relation, for SQL. Raises StoreError."""
    return duckdb.from_arrow(_table(sources, notebooks, SCHEMA, where))


def runs(place: Path | str, notebooks: Path | None = None) -> pd.DataFrame:
    """One row a run, in a folder of runs, a packed file or a folder of such files: what became of it, what it took, where it came from.

    `state`: finished, failed, unreadable (both with `error`) or unfinished; packed runs have finished. Columns that a run lacks are empty.
    Raises StoreError.
    """
    present = Present(notebooks)
    found = [run for each in _places([place]) for run in listing.of_place(each)]
    table = pd.DataFrame(found, columns=RUN_COLUMNS).astype(dict.fromkeys(COSTS, float))
    finished = table["state"] == "finished"
    codes = zip(table["notebook"], table["code"], table["uses"])
    return table.assign(stale=[bool(known and present.is_stale(*key)) for known, key in zip(finished, codes)])


def pack(sources: Sequence[Path | str], target: Path, notebooks: Path | None = None) -> int:
    """Write the rows of finished runs, with all that is needed to read them, to one Parquet file; returns their number.

    Values are kept to DECIMALS decimals, which more than halves the file: no interval of them is that narrow.
    """
    table = _table(sources, notebooks, PACKED, {})
    table = table.set_column(table.schema.get_field_index("value"), "value", _rounded(table["value"]))
    provenance.write_atomic(target, lambda path: pq.write_table(table, path, **COMPRESSION, **NUMBERS))
    return len(table)


def _rounded(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """To DECIMALS decimals: as decimal numbers, or, where one is too large for these or is none, as floats."""
    rounded, digits = pc.round(values, DECIMALS), pa.decimal128(9, DECIMALS)  # of 32 bits
    fits = pc.less(pc.abs(rounded), 10.0 ** (digits.precision - DECIMALS))  # false of NaN
    return rounded.cast(digits) if pc.all(fits).as_py() else rounded


def sources(place: Path | str) -> list[Path]:
    """What a place holds for `read`: the packed files of a folder that has any, else the folder or file itself; nothing where nothing is.

    A relative place counts from the project's root; "" is no place.
    """
    if not str(place):
        return []
    root = provenance.project_root() / place
    return (_packs(root) or [root]) if root.exists() else []


def packed(*sources: Path | str, notebooks: Path | None = None) -> dict[str, bool]:
    """Of each run whose rows are in these files (or in the .parquet files of these folders): whether it is stale. Raises StoreError."""
    files = [file for path in map(Path, sources) for file in _packs(path)]
    origins = [run | {"source": number} for number, file in enumerate(files) for run in listing.of_place(file)]
    chosen = _chosen(origins, Present(notebooks))
    return dict(zip(chosen["run"].to_pylist(), chosen["stale"].to_pylist()))


def _table(sources: Sequence[Path | str], notebooks: Path | None, columns: Iterable[str], where: Mapping[str, Any]) -> pa.Table:
    if unknown := sorted(set(where) - set(SCHEMA)):
        raise StoreError(f"no column {', '.join(unknown)}; there are {', '.join(SCHEMA)}")
    places, allowed = _places(sources), {column: _values(wanted) for column, wanted in where.items()}
    still: list = []
    for attempt in itertools.count():
        # in the end without those that always start anew
        found, failure = _listed(places) if attempt < LISTINGS else still, None
        with duckdb.connect() as connection:
            connection.execute("SET enable_progress_bar = false")  # a notebook would keep it
            try:
                rows = _everything(connection, found, notebooks)
                for column, wanted in allowed.items():
                    rows = rows.filter(duckdb.ColumnExpression(column).isin(*wanted))
                table = rows.project(", ".join(columns)).to_arrow_table()
            except duckdb.Error as error:
                failure = error
        still = [(path, [run for run in runs if _rests(run)]) for path, runs in found]
        # what started anew meanwhile may have been read in part
        if still == found and failure:
            raise failure
        if still == found:
            _warn_of_unreadable(found)
            return table


def _values(wanted: Any) -> list[duckdb.Expression]:
    """What a column may be: one value, or several (a list, a set, an array, a column of a table)."""
    several = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Iterable) else wanted
    # NULL, which nothing equals: DuckDB takes no empty list
    return [duckdb.ConstantExpression(value) for value in (None, *several)]


def _rests(run: Mapping[str, Any]) -> bool:
    """Whether a run has not started anew since it was listed; packed ones never do."""
    return "stamp" not in run or listing.stamp(Path(run["folder"])) == run["stamp"]


def _warn_of_unreadable(found: Listed) -> None:
    if names := [f"{run['folder']} ({run['error']})" for _, runs in found for run in runs if run["state"] == "unreadable"]:
        # whoever asked is three calls up: this, _table, read
        warnings.warn(f"left out, as they cannot be read: {'; '.join(names)}", stacklevel=4)


def _places(sources: Iterable[Path | str]) -> list[Path]:
    """Packed files and folders of runs; a folder may hold both."""
    return [place for path in map(Path, sources) for place in ([*_packs(path), path] if path.is_dir() else [path])]


def _packs(path: Path) -> list[Path]:
    """The packed files that a folder holds; of a file, itself."""
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def _listed(places: Sequence[Path]) -> Listed:
    """Each place with its runs that have rows, or would have if they could be read."""
    has_rows = lambda run: run["state"] == "finished" and (not run["folder"] or Path(run["folder"], "results.parquet").exists())
    return [(place, [run for run in listing.of_place(place) if run["state"] == "unreadable" or has_rows(run)]) for place in places]


def _everything(connection: duckdb.DuckDBPyConnection, found: Listed, notebooks: Path | None) -> duckdb.DuckDBPyRelation:
    """Rows with OF_A_RUN and `stale`, ordered by source and run as they were written."""
    columns = [f"CAST({name} AS {kind}) AS {name}" for name, kind in ROWS.items() if name != "run"]
    # a column that a file lacks is empty
    connection.execute(f"CREATE TABLE template ({', '.join(f'{name} {kind}' for name, kind in ROWS.items())})")
    parts, origins = [], []
    for number, (place, runs) in enumerate(found):
        finished = [run for run in runs if run["state"] == "finished"]
        origins += [run | {"source": number} for run in finished]
        if place.is_file():
            files, run = [str(place)], "run"
        else:
            files, run = [str(Path(run["folder"], "results.parquet")) for run in finished], "parse_filename(parse_dirpath(filename))"
        if files:
            listed = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
            rows = f"SELECT * FROM read_parquet([{listed}], union_by_name = true, filename = true, file_row_number = true)"
            parts.append(f"SELECT {number} AS source, replace({run}, '{OLD}', '') AS run, file_row_number, {', '.join(columns)} "
                         f"FROM (SELECT * FROM template UNION ALL BY NAME {rows})")
    connection.register("origin", _chosen(origins, Present(notebooks)))
    parts = parts or [f"SELECT 0 AS source, run, 0 AS file_row_number, {', '.join(columns)} FROM template"]
    rows = " UNION ALL ".join(parts)
    return connection.sql(f"SELECT * FROM ({rows}) JOIN origin USING (source, run) ORDER BY source, run, file_row_number")


def _chosen(origins: list[dict[str, Any]], present: Present) -> pa.Table:
    """Of each run the origin that started last, with `stale`."""
    latest: dict[str, dict[str, Any]] = {}
    for origin in origins:
        if origin["run"] not in latest or origin["started"] > latest[origin["run"]]["started"]:
            latest[origin["run"]] = origin
    stale = cache(present.is_stale)
    kinds = {"VARCHAR": pa.string(), "DOUBLE": pa.float64()}
    of_a_run = [(name, kinds[kind]) for name, kind in OF_A_RUN.items()]
    schema = pa.schema([("source", pa.int32()), ("run", pa.string()), *of_a_run, ("stale", pa.bool_())])
    rows = [{**{name: run[name] for name in ("source", "run", *OF_A_RUN)}, "stale": stale(run["notebook"], run["code"], run["uses"])}
            for run in latest.values()]
    return pa.Table.from_pylist(rows, schema=schema)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (2: nothing was written)."""
    parser = argparse.ArgumentParser(prog="python -m helpers.store", description="Put all finished runs into one Parquet file.")
    parser.add_argument("action", choices=["pack"])
    parser.add_argument("sources", nargs="+", help="folders of runs, packed files")
    parser.add_argument("target", type=Path)
    options = parser.parse_args(arguments)
    try:
        count = pack(options.sources, options.target)
    except StoreError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{count:,} rows, {options.target.stat().st_size / 2**20:.2f} MiB in {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
