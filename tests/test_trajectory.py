"""Trajectories: measuring on the way changes nothing, ends agree with the finished edit, and matching is exact on straight lines."""

from __future__ import annotations

import attacks_cases as cases
import pandas as pd
import pytest
import small
import torch

from helpers.masks import mask, matrices
from helpers.unlearning.evaluation import evaluate, summarize
from helpers.unlearning.finetune import finetune
from helpers.unlearning.trajectory import Trajectory, at_first, by_matrix

CHEAP = dict(texts=cases.texts()[:4], n_retain=8, orders=(0,), n_neighbors=1)


@pytest.fixture(scope="module")
def walked():
    model, split = cases.known(), cases.a_split()
    units, before = mask(model, ["mlp 1", "head 0.1"], "units"), small.weights(model)
    path = Trajectory(model, split, units, (0, 3, 6), **CHEAP)
    edit = finetune(model, split, units, "edit", cases.QUICK, cases.texts(), watch=path)
    assert small.same(model, before)
    return model, split, units, path, edit


def test_measuring_on_the_way_leaves_the_edit_as_it_would_have_been(walked):
    model, split, units, _, edit = walked
    plain = finetune(model, split, units, "edit", cases.QUICK, cases.texts())
    assert all(torch.equal(value, edit.values[name]) for name, value in plain.values.items())


def test_it_begins_at_the_base_and_ends_at_the_edit(walked):
    model, split, _, path, edit = walked
    table = path.table()
    assert table["step"].tolist() == [0, 3, 6] and table["norm"].iloc[0] == 0
    assert table["norm"].iloc[-1] == pytest.approx(edit.norm, rel=1e-5) and table["norm"].is_monotonic_increasing
    base = evaluate(model, split, **CHEAP)
    with edit.applied(model):
        after = evaluate(model, split, **CHEAP)
    for row, rows in ((table.iloc[0], base), (table.iloc[-1], after)):
        expected = summarize(rows, base).set_index("reading").loc["probability"]
        for name in ("edit", "forget", "retain", "mcq_edit", "mcq_retain", "text_loss"):
            assert row[name] == pytest.approx(expected[name], abs=1e-6), name
    assert not table["collapsed"].iloc[0] and edit.history["norm"].notna().sum() == 3


def test_at_first_lies_on_straight_lines_and_takes_the_first_crossing():
    path = pd.DataFrame({"step": [0, 10, 20, 30], "edit": [0.0, 0.5, 1.0, 0.4], "norm": [0.0, 1.0, 4.0, 9.0], "mask": "a"})
    assert at_first(path, "edit", 0.75).to_dict() == {"step": 15.0, "edit": 0.75, "norm": 2.5}
    assert at_first(path, "edit", 0.5)["step"] == 10 and at_first(path, "edit", 0.0)["step"] == 0
    assert at_first(path, "edit", 0.45)["step"] == 9  # and not the later one, on the way down
    assert at_first(path, "norm", 10.0).isna().all()


def test_norms_by_matrix_add_up_to_that_of_the_edit(walked):
    model, _, _, _, edit = walked
    table = by_matrix(model, edit)
    assert len(table) == len(matrices(model)) and (table["norm"] ** 2).sum() ** 0.5 == pytest.approx(edit.norm, rel=1e-6)
    moved = {f"{row['matrix']} {row['layer']}" for _, row in table[table["norm"] > 0].iterrows()}
    assert {"gate 1", "up 1", "down 1", "q 0", "o 0"} <= moved <= {"gate 1", "up 1", "down 1", "q 0", "k 0", "v 0", "o 0"}
