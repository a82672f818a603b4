"""The command line of the report.

    python -m helpers.report                                    # rows in data/results and runs, page in runs/report
    python -m helpers.report --rows data/results/reference.parquet --out runs/reference
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from helpers import claims, provenance
from helpers.report import page
from helpers.report.rows import SWEEP, collect

PLACES = ("data/results", "runs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write `<out>/index.html` and `<out>/figures/`; returns the exit status (2: nothing was written)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m helpers.report", description="A static page from stored rows.")
    parser.add_argument("--rows", nargs="+", type=Path, help=f"folders of runs, packed files (default: {' and '.join(PLACES)}, where they exist)")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder for the page")
    parser.add_argument("--fresh", action="store_true", help="leave out rows that other code, data or weights made")
    parser.add_argument("--date", default=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), help="the date on the page (default: now)")
    options = parser.parse_args(given)
    places = options.rows or [path for name in PLACES if (path := provenance.project_root() / name).is_dir()]
    try:
        if not places:
            raise ValueError(f"no rows: there is neither {' nor '.join(PLACES)}; make some with `{SWEEP}`, or name other places (--rows)")
        material = collect(places, options.fresh)
        command = shlex.join(["python", "-m", "helpers.report", *given])
        text = page.render(material, claims.load(), options.date, command, options.out / "figures")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    provenance.write_text(options.out / "index.html", text)
    print(f"{len(material.rows):,} rows of {material.rows['run'].nunique()} runs: {options.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
