"""An edit in part: weights on a straight line, the whole at 1, nothing at 0, and the model as it was afterwards."""

from __future__ import annotations

import attacks_cases as cases
import pytest
import small
import torch

from helpers.unlearning.edit import EditError
from helpers.unlearning.evaluation import evaluate, summarize
from helpers.unlearning.scaling import along, partly

CHEAP = dict(texts=cases.texts()[:4], n_retain=8, orders=(0,), n_neighbors=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share_of_weights", [None, 0.3])
def test_weights_lie_on_a_straight_line(dtype, share_of_weights):
    model = cases.random_model(dtype=dtype)
    edit, old = cases.random_edit(model, share=share_of_weights), small.weights(model)
    for share in (0.0, 0.25, 1.0):
        part = partly(model, edit, share)
        with part.applied(model):
            for name, value in edit.values.items():
                chosen = ... if edit.parts[name] is None else edit.parts[name]
                expected = (old[name][chosen].double() * (1 - share) + value.double() * share).to(dtype)
                assert torch.equal(model.hf.get_parameter(name)[chosen], value if share == 1 else expected)
        assert part.norm == pytest.approx(share * edit.norm) and part.record["share"] == share and small.same(model, old)
    for share in (-0.1, 1.5):
        with pytest.raises(EditError, match=f"share={share}"):
            partly(model, edit, share)
    with pytest.raises(EditError, match="other weights"):
        partly(cases.known(), edit, 0.5)


def test_along_begins_at_the_model_and_ends_at_the_edit():
    model, given, edit = cases.known(), cases.a_split(), cases.edit()
    before = small.weights(model)
    table = along(model, given, edit, (1.0, 0.5), **CHEAP)
    assert table["share"].tolist() == [0.0, 0.5, 1.0] and table["norm"].tolist() == pytest.approx([0, edit.norm / 2, edit.norm])
    base = evaluate(model, given, **CHEAP)
    with edit.applied(model):
        after = evaluate(model, given, **CHEAP)
    for row, rows in ((table.iloc[0], base), (table.iloc[-1], after)):
        expected = summarize(rows, base).set_index("reading").loc["probability"]
        assert all(row[name] == pytest.approx(expected[name], abs=1e-6) for name in ("edit", "forget", "retain", "text_loss"))
    assert table["edit"].is_monotonic_increasing and not table["collapsed"].iloc[0] and small.same(model, before)
