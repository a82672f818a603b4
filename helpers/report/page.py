"""The report as one HTML page: static, self-contained, the same rows give the same bytes (but for the date, which is passed in)."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jinja2
import pandas as pd
import yaml
from matplotlib.figure import Figure

from helpers import claims, provenance, results
from helpers.claims import Claims
from helpers.report import commands, edits, figures, selections, tables
from helpers.report.commands import Made
from helpers.report.figures import READINGS, Kind, Picture
from helpers.report.rows import Material
from helpers.report.tables import counted, estimate, number
from helpers.report.template import PAGE

MARKS = {"holds": "✓", "fails": "✗", "undecided": "?"}
HIDDEN = ("value", "low", "high", "facts_low", "facts_high", "seeds_low", "seeds_high", "seeds_min", "seeds_max", "n_facts", "n_seeds",
          "missing", "note", "chance", "reading", "collapsed", "panel")


def render(material: Material, declared: Claims, date: str, command: str, figure_folder: Path | None = None) -> str:
    """The page. `command` is what makes it again; figures are also saved as PNG files where there is a `figure_folder`.

    Raises `claims.ClaimsError` and `ValueError` for rows that contradict each other.
    """
    rows = material.rows
    made, chance = edits.made(rows), figures.floors(rows)
    compared = claims.comparisons(declared, rows)
    found = tables.verdicts(declared, rows, made, compared)
    drawn = selections.named(rows)
    makers, runs = commands.load(), material.runs
    behind = lambda names: makers.behind(runs[runs["run"].isin(names)])
    sections = [_section(kind, drawn, chance, made, behind, figure_folder) for kind in figures.KINDS]
    ours, theirs = tables.columns(rows)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"estimate": estimate, "counted": counted, "number": number, "asked": tables.asked}
    return environment.from_string(PAGE).render(
        date=date, command=command, material=material, count=_counts(runs), marks=MARKS, readings=READINGS,
        models=[*ours, *(theirs or ["the paper's models"])], theirs=tables.published_models(), tally=_tally(found), rule=declared.rule,
        families=_families(declared, found, rows), board=tables.leaderboard(rows, made=made), places=tables.localizations(rows),
        decided=tables.in_words(declared, tables.decided(declared, rows, made, compared)), sections=sections, packs=material.packs,
        origin=tables.provenance(runs), chance=chance, taken=edits.TAKEN, everything=behind(rows["run"].unique()),
        board_made=behind(tables.attacked_runs(rows)), places_made=behind(rows.loc[rows["method"] == results.LOCALIZE, "run"].unique()))


def command_of(kind: Kind, sweeps: Path | None = None) -> str:
    """What brings rows for a figure that has none: the sweeps that run its notebooks, else the notebooks themselves."""
    sweeps = sweeps or provenance.project_root() / "sweeps"
    entries = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(sweeps.glob("*.yaml"))}
    able = [name for name, parts in entries.items() if {part["notebook"] for part in parts} & set(kind.notebooks)]
    return " && ".join(map(commands.sweep, able)) or commands.by_notebooks(*kind.notebooks)


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
    """How many runs there are, are used, are stale, are stale and shown, are of a light profile and shown, and give way to another run in part or whole."""
    stale, used = runs["stale"].astype(bool), runs["used"] > 0
    aside = (~stale | (stale & used).any()) & (runs["used"] < runs["rows"])
    kinds = {"used": used, "stale": stale, "stale_shown": stale & used, "light": used & runs["profile"].isin(edits.LIGHT), "set_aside": aside}
    return {"runs": len(runs), **{name: int(kind.sum()) for name, kind in kinds.items()}}


def _tally(found: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Model → verdict, or "not run" → how many claims."""
    parts = found.groupby("model", sort=False) if len(found) else ()
    return {model: {name: int((part["state"] == name).sum()) for name in (*MARKS, tables.NOT_RUN)} for model, part in parts}


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


def _section(kind: Kind, rows: pd.DataFrame, chance: Mapping[str, float], made: pd.DataFrame, behind: Callable[[Iterable[str]], Made],
             folder: Path | None) -> dict:
    shown = []
    for place, picture in enumerate(figures.pictures(kind, rows, chance, made)):
        image = picture_bytes(picture.figure)
        if folder:
            provenance.write_atomic(folder / f"{kind.name}-{place}.png", lambda path, image=image: path.write_bytes(image))
        counts = {name: _range(picture.table[f"n_{name}"]) for name in ("facts", "seeds")}
        shown.append({"where": picture.where, "note": picture.note, "image": base64.b64encode(image).decode(), "table": numbers(picture),
                      "made": behind(picture.runs), **counts})
    return {"kind": kind, "pictures": shown, "command": command_of(kind)}


def _range(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low} to {high}"
