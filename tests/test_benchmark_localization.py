"""The side-by-side timings on a very small shape: equal numbers, and columns that are what they say."""

import dataclasses
import json
import time

import pandas as pd
import pytest
import torch

from benchmarks import arithmetic, localization
from benchmarks.localization import METHODS, Ours, Side, agree, main, row, rows
from benchmarks.measure import Cost, compare, counted
from benchmarks.shapes import SHAPES, Shape, build, pairs
from helpers.localization.path_patching import receiver_paths
from helpers.sites import TracingError

SMALL = Shape("small", n_layers=3, n_heads=4, n_kv_heads=2, d_model=32, d_mlp=48, vocab_size=64, prompts=4, length=6)


@pytest.fixture(scope="module")
def found():
    """The rows of every method, which are not made unless the numbers agree."""
    pytest.importorskip("transformer_lens")
    return pd.DataFrame(row for more in rows(SMALL, list(METHODS), repeats=1) for row in more)


def test_numbers_agree(found):
    assert found.groupby("method", sort=False)["rival"].apply(list).tolist() == [["nnsight", "TransformerLens"]] * len(METHODS)
    assert (found["difference"] <= 1e-4).all() and (found["spread"] > 1e-2).all()
    components = dict(zip(METHODS, found["components"][::2]))
    assert components == {
        "head_paths": 12, "receiver_paths": 8, "direct_paths": 4, "residual": 18, "heads": 12, "causal_tracing": 18, "attribution": 15
    }  # fmt: skip


def test_ratios_are_of_the_two_timings(found):
    pd.testing.assert_series_equal(found["ratio"], found["rival_s"] / found["ours_s"], check_names=False)
    pd.testing.assert_series_equal(found["reached"], found["ratio"] / found["limit"], check_names=False)
    assert (found[["ours_s", "rival_s", "cpu_ratio"]] > 0).all(axis=None) and (found["verdict"] == "").all()


def test_nothing_needs_less_than_the_least(found):
    """Ours does at least the least arithmetic, and for the sweeps the rivals' is no less than a pass a component."""
    assert (found["work_ratio"] <= found["limit"] * 1.0001).all()
    work = arithmetic.Work(SMALL)
    loops = found[found["method"] != METHODS["attribution"].title]
    for name, method in METHODS.items():
        if name != "attribution":
            least = method.least(SMALL, *method.arguments(build(SMALL)))
            own = loops[loops["method"] == method.title]
            assert (own["limit"] * least >= own["components"] * work.forward).all()


def test_least_work_of_a_pass():
    """Counted by PyTorch, of which the last layer's queries and what the causal mask hides are no part of the least."""
    model, prompts = build(SMALL), pairs(SMALL)
    _, operations = counted(lambda: localization._forward(model, prompts))
    work, n, length = arithmetic.Work(SMALL), SMALL.prompts, SMALL.length
    spared = (length - 1) * (work.q + work.o + work.mlp) + work.pair * (length**2 - length)
    masked = work.pair * (SMALL.n_layers - 1) * (length**2 - length) // 2
    assert operations == work.forward + n * (spared + masked)


def test_row_and_verdict():
    side = lambda values, operations, seconds: Side(torch.tensor(values), operations, Cost(seconds, 2 * seconds, 3_000_000))
    ours, rival = side([[1.0], [2.0]], 10, 0.5), side([[1.0], [2.5]], 60, 4.0)
    made = row(ours, rival, Cost(0.25, 0.25, None), 5, (7, 9))
    assert made["ratio"] == 8 and made["cpu_ratio"] == 8 and made["work_ratio"] == 6
    assert made["limit"] == 12 and made["reached"] == 8 / 12 and made["difference"] == 0.5 and made["ours_MB"] == 3
    assert (made["ours_passes"], made["rival_passes"]) == (2, 16)
    assert made["verdict"] == "pass (bar 7)"
    verdicts = [row(ours, rival, Cost(1, 1, None), 5, bars)["verdict"] for bars in ((), (9,), (7, 8))]
    assert verdicts == ["", "FAIL (bar 9)", "pass, aim 8 met"]


def test_disagreement_stops():
    values = torch.tensor([[0.0, 1.0], [1.0, 3.0]])
    agree({"ours": values, "rival": values + 9e-5}, "fine")
    for wrong in (values + 2e-4, values[:1], values * float("nan")):
        with pytest.raises(AssertionError, match="title: rival .* is off ours"):
            agree({"ours": values, "rival": wrong}, "title")
    with pytest.raises(AssertionError, match="title: the numbers hardly vary"):
        agree({"ours": values[:1].repeat(2, 1), "rival": values[:1].repeat(2, 1)}, "title")


def test_a_wrong_rival_is_noticed(monkeypatch):
    class Wrong(Ours):
        def heads(self):
            return super().heads().flip(0)

    monkeypatch.setattr(localization, "RIVALS", {"wrong": Wrong})
    with pytest.raises(AssertionError, match="heads, all positions, small: wrong"):
        next(rows(SMALL, ["heads"], 1))


def test_costs_are_medians_and_peaks():
    megabytes, seconds, turns = iter((1, 40, 1)), iter((0.01, 1.0, 0.01)), []

    def fill():
        turns.append("fill")
        torch.ones(next(megabytes) * 250_000).sum()

    def wait():
        turns.append("wait")
        time.sleep(next(seconds))

    costs = compare({"fill": fill, "wait": wait}, 3)
    assert turns == ["fill", "wait"] * 3
    assert 0.01 <= costs["wait"].seconds < 1 and costs["wait"].cpu_seconds < costs["wait"].seconds
    if costs["fill"].peak_bytes is not None:
        assert 39e6 < costs["fill"].peak_bytes < 60e6 and costs["wait"].peak_bytes < 5e6
    with pytest.raises(ValueError, match="repeats 0: at least one"):
        compare({}, 0)


def test_command_line(monkeypatch, tmp_path, capsys):
    """Files with every row, and an exit status that says whether the bars are met."""
    monkeypatch.setitem(SHAPES, "tiny", SMALL)
    monkeypatch.setattr(localization, "RIVALS", {"itself": Ours})
    monkeypatch.setitem(METHODS, "heads", dataclasses.replace(METHODS["heads"], bars={"small": (1e9,)}))
    arguments = ["--methods", "heads", "--repeats", "1", "--prompts", "3", "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "FAIL (bar 1e+09)" in capsys.readouterr().out
    table, told = pd.read_csv(tmp_path / "localization.csv"), json.loads((tmp_path / "localization.json").read_text())
    assert table["rival"].tolist() == ["itself"] and table["prompts"].tolist() == [3] and table["difference"].tolist() == [0]
    assert told["tables"]["small"][0]["ratio"] == pytest.approx(table["ratio"][0]) and told["given"]["shapes"][0]["n_layers"] == 3
    assert "packages" in told["provenance"]
    monkeypatch.setitem(METHODS, "heads", dataclasses.replace(METHODS["heads"], bars={"small": (1e-9,)}))
    assert main(arguments) == 0
    for wrong, message in ((["--repeats", "0"], "--repeats 0: at least 1"), (["--methods", "knock"], "invalid choice: 'knock'")):
        with pytest.raises(SystemExit):
            main(wrong)
        assert message in capsys.readouterr().err


def test_receivers_apart():
    """One row a sender and receiver: the tables of the receivers one by one."""
    model, prompts = build(SMALL), pairs(SMALL)
    heads = ["head 2.1", "head 1.0", "head 2.3"]
    for above in ("all", "mlps"):
        options = {"receiver": "heads", "inputs": "qv", "above": above, "senders": ["mlp 0", "head 0.2"]}
        together = receiver_paths(model, prompts, heads, apart=True, **options).set_index("receiver")
        for head in heads:
            alone = receiver_paths(model, prompts, [head], **options)
            pd.testing.assert_frame_equal(together.loc[head].reset_index(drop=True), alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(TracingError, match="apart goes with receiver 'heads'"):
        receiver_paths(model, prompts, heads, apart=True)
