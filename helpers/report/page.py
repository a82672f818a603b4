"""The report as one HTML page: static, self-contained, the same rows give the same bytes (but for the date, which is passed in)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml
from matplotlib.figure import Figure

from helpers import claims, provenance
from helpers.claims import Claims
from helpers.report import figures, tables
from helpers.report.figures import READINGS, Kind, Picture
from helpers.report.rows import Material
from helpers.report.template import PAGE

MARKS = {"holds": "✓", "fails": "✗", "undecided": "?"}
HIDDEN = ("value", "low", "high", "facts_low", "facts_high", "seeds_low", "seeds_high", "seeds_min", "seeds_max", "n_facts", "n_seeds",
          "missing", "note", "chance", "reading")


def render(material: Material, declared: Claims, date: str, command: str, figure_folder: Path | None = None) -> str:
    """The page. `command` is what makes it again; figures are also saved as PNG files where there is a `figure_folder`.

    Raises `claims.ClaimsError` and `ValueError` for rows that contradict each other.
    """
    rows = material.rows
    found = tables.verdicts(declared, rows)
    ours, theirs = tables.columns(rows)
    chance = figures.floors(rows)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"estimate": estimate, "number": number}
    return environment.from_string(PAGE).render(
        date=date, command=command, material=material, count=_counts(material.runs), marks=MARKS, readings=READINGS,
        models=[*ours, *(theirs or ["the paper's models"])], theirs=tables.published_models(), tally=_tally(found), rule=declared.rule,
        families=_families(declared, found, rows), board=tables.leaderboard(rows), places=tables.localizations(rows),
        sections=[_section(kind, rows, chance, figure_folder) for kind in figures.KINDS], origin=tables.provenance(material.runs), chance=chance)


def number(value: float, signed: bool = False) -> str:
    """Two decimals; a dash where there is none."""
    return "–" if pd.isna(value) else f"{value:+.2f}" if signed else f"{value:.2f}"


def estimate(row: Mapping[str, Any], name: str = "", signed: bool = False) -> str:
    """Value and interval of a row, "0.85 [0.81, 0.89]"; `name` where its columns begin with one."""
    value, low, high = (row.get(key) for key in ((name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")))
    return "–" if pd.isna(value) else f"{number(value, signed)} [{number(low, signed)}, {number(high, signed)}]"


def command_of(kind: Kind, sweeps: Path | None = None) -> str:
    """What makes the rows of a figure: the sweeps that run its notebooks, else the notebooks themselves."""
    sweeps = sweeps or provenance.project_root() / "sweeps"
    entries = {file.name: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(sweeps.glob("*.yaml"))}
    found = [name for name, parts in entries.items() if {part["notebook"] for part in parts} & set(kind.notebooks)]
    by_hand = f"python -m helpers.notebooks run {' '.join(name[:2] for name in kind.notebooks)} --profile standard"
    return " && ".join(f"python -m helpers.sweep sweeps/{name}" for name in found) or by_hand


def numbers(picture: Picture) -> pd.DataFrame:
    """The estimates of a figure as text, one column a reading, with the facts and seeds behind them."""
    table = picture.table
    names = [*(name for name in table if name not in HIDDEN), "facts", "seeds"]
    text = table.assign(text=[estimate(row) for _, row in table.iterrows()], facts=table["n_facts"], seeds=table["n_seeds"])
    keys = text[names].drop_duplicates()
    for reading, label in READINGS.items():
        keys = keys.merge(text.loc[text["reading"] == reading, [*names, "text"]].rename(columns={"text": label}), on=names, how="left")
    whole = {name: keys[name].map("{:g}".format) for name in keys.select_dtypes("float")}
    return keys.assign(**whole).fillna("–")


def picture_bytes(figure: Figure) -> bytes:
    """A PNG without a version stamp: an unchanged picture stays the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _counts(runs: pd.DataFrame) -> dict[str, int]:
    """How many runs there are, are used, are stale, are stale and shown, and give way to another run in part or whole."""
    stale, used = runs["stale"].astype(bool), runs["used"] > 0
    aside = (~stale | (stale & used).any()) & (runs["used"] < runs["rows"])
    kinds = {"used": used, "stale": stale, "stale_shown": stale & used, "set_aside": aside}
    return {"runs": len(runs), **{name: int(kind.sum()) for name, kind in kinds.items()}}


def _tally(found: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Model → verdict → how many claims."""
    parts = found.groupby("model", sort=False) if len(found) else ()
    return {model: {name: int((part["verdict"] == name).sum()) for name in MARKS} for model, part in parts}


def _families(declared: Claims, found: pd.DataFrame, rows: pd.DataFrame) -> list[dict]:
    cells = list(tables.cells(declared, found, rows))
    entry = lambda claim, entries: {"claim": claim, "cells": entries, "published": _published(declared, claim)}
    return [{"question": question, "claims": [entry(claim, entries) for claim, entries in cells if claim.family == name]}
            for name, question in declared.families.items()]


def _published(declared: Claims, claim: claims.Claim) -> list[dict]:
    """One line a measure: the figure of each mask."""
    parts = tables.published(declared, claim).groupby(["measure", "setting"], sort=False)
    values = lambda part: [(mask, number(value)) for mask, value in zip(part["mask"], part["value"])]
    return [{"measure": measure, "setting": setting, "runs": part["n_runs"].iloc[0], "values": values(part)} for (measure, setting), part in parts]


def _section(kind: Kind, rows: pd.DataFrame, chance: Mapping[str, float], folder: Path | None) -> dict:
    shown = []
    for place, picture in enumerate(figures.pictures(kind, rows, chance)):
        image = picture_bytes(picture.figure)
        if folder:
            provenance.write_atomic(folder / f"{kind.name}-{place}.png", lambda path, image=image: path.write_bytes(image))
        counts = {name: _range(picture.table[f"n_{name}"]) for name in ("facts", "seeds")}
        shown.append({"where": picture.where, "image": base64.b64encode(image).decode(), "table": numbers(picture), **counts})
    return {"kind": kind, "pictures": shown, "command": command_of(kind)}


def _range(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low} to {high}"
