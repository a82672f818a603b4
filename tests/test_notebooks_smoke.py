"""Each notebook that edits, once in the smoke profile on the facts that its other tests do not take: it goes through, and its rows say what they are of."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from notebook_cases import checks, executed

NAMES = ["03_localization", "04_localized_editing", "05_localized_unlearning", "06_attacks", "07_weight_masks", "08_baselines",
         "09_mechanism_or_depth", "10_real_models", "11_scaling", "12_report"]


@pytest.mark.parametrize("name", NAMES)
def test_world_facts_go_through(name, tmp_path):
    folder = executed(name, tmp_path, profile="smoke", facts="world")
    recorded = pd.read_parquet(folder / "rows.parquet")
    assert len(recorded) and set(recorded["profile"]) == {"smoke"} and checks(folder)
    if name != "10_real_models":  # which compares nothing
        rows = pd.read_parquet(folder / "results.parquet")
        assert len(rows) and rows["facts"].str.startswith("world").all()
        assert np.isfinite(rows["value"]).all() and (rows["seed"] == 0).all()
