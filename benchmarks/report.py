"""What every benchmark says in the end: tables, bars met or missed, and a file that tells where the numbers come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch

from helpers import provenance


def judge(value: float, bar: float | None = None, aim: float | None = None, at_least: bool = False) -> str:
    """What is to be said of a value that should be at most (or `at_least`) `bar`, better `aim`; nothing without a bar."""
    if bar is None:
        return ""
    if math.isnan(value):
        return f"not measured (bar {bar:g})"
    if aim is not None and (value >= aim if at_least else value <= aim):
        return f"pass, aim {aim:g} met"
    return f"pass (bar {bar:g})" if (value >= bar if at_least else value <= bar) else f"FAIL (bar {bar:g})"


def save(path: Path, tables: Mapping[str, pd.DataFrame], **given) -> None:
    """Print the tables; write them to a JSON file with what was `given`, the code's commit, versions and the machine."""
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string(index=False, na_rep='', float_format=lambda value: f'{value:.4g}')}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    origin = {"git": provenance.git_state(provenance.project_root()), **provenance.describe_machine(), "gpu": gpu}
    # through pandas, which knows how to write its own numbers and the missing ones
    rows = {name: table.astype(object).where(table.notna(), None).to_dict("records") for name, table in tables.items()}
    provenance.write_json(path, {"given": given, "provenance": origin, "tables": rows})
    print(f"\nwritten to {provenance.short_path(path)}")
