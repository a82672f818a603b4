"""What the benchmark of editing compares is the same edit, and what it says of the costs is so."""

import dataclasses
import json
import math
import sys

import attacks_cases
import pandas as pd
import pytest
import small
import torch

from benchmarks import editing, plain
from benchmarks.report import judge, save
from helpers import presets
from helpers.masks import mask
from helpers.memory import skeleton
from helpers.selection import preset
from helpers.unlearning.evaluation import evaluate
from helpers.unlearning.training import Settings

FAMILIES = ("llama", "gemma", "gemma2", "qwen3", "neox")
# a batch larger than the forget set, so that rows come more than once a step; chunks that do not divide it
QUICK = Settings(learning_rate=3e-3, steps=6, batch=8, chunk=3, text_tokens=8, forget_weight=2.0, retain_weight=0.7, text_weight=1.3)


def work(family: str = "llama", settings: Settings = QUICK, dtype: torch.dtype = torch.float32) -> editing.Work:
    return editing.Work(small.model(family, dtype), small.a_split(), small.TEXTS, settings)


# The same edit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_restricted_to_a_mask_the_plain_loop_makes_our_edit(family):
    given = work(family)
    before = small.weights(given.model)
    assert editing.difference(given, mask(given.model, ["mlp 1", "attn 2"])) < 1e-4
    assert small.same(given.model, before)


def test_another_edit_is_noticed():
    """One loss term weighted otherwise, one step fewer, other draws: each is far above the tolerance."""
    given = work()
    chosen = mask(given.model, ["mlp 1"])
    edit = editing.ours(given, chosen)
    gap = lambda name: given.model.hf.get_parameter(name).detach().double() - edit.values[name].double()
    for changes, seed in (({"text_weight": 1.0}, 0), ({"steps": 5}, 0), ({}, 1)):
        with plain.lent(given.model):
            plain.train(given.model, given.split, given.texts, dataclasses.replace(QUICK, **changes), list(edit.values), seed)
            assert math.hypot(*(float(gap(name).norm()) for name in edit.values)) / edit.norm > 2 * editing.TOLERANCE
    table = editing.check(given)
    assert list(table["variant"]) == list(editing.masks(given.model)) and table["difference"].max() < 1e-3


def test_check_raises_where_the_loop_ends_elsewhere(monkeypatch):
    monkeypatch.setattr(plain, "train", lambda *_: None)
    with pytest.raises(AssertionError, match="ends elsewhere.*lookup"):
        editing.check(work())


def test_the_plain_loop_trains_everything_and_the_model_comes_back():
    given = work("gemma2")
    model, before = given.model, small.weights(given.model)
    with plain.lent(model):
        plain.train(model, given.split, given.texts, given.settings)
        assert not any(torch.equal(p, before[name]) for name, p in model.hf.named_parameters())
    assert small.same(model, before)
    assert not any(p.requires_grad or p.grad is not None for p in model.hf.parameters())


def test_the_plain_loop_has_the_default_attention_where_that_is_exact():
    for family, wanted in (("llama", "sdpa"), ("gemma2", "eager")):
        model = small.model(family)
        with plain.lent(model):
            assert model.hf.config._attn_implementation == wanted
        assert model.hf.config._attn_implementation == "eager"


def test_windows_on_a_real_shape():
    model = skeleton(presets.config("gemma-2-9b"))
    masks = editing.masks(model)
    assert masks["lookup"].units == preset(model, "gemma-2-9b", "sports", "flu").units
    assert masks["late"].units == tuple(f"mlp {layer}" for layer in range(37, 42))
    assert masks["late"].n_parameters == masks["lookup"].n_parameters


# Seconds and bytes ----------------------------------------------------------------------------------


def test_a_cost_is_that_of_one_edit_and_leaves_the_model():
    """The plain loop over everything needs more memory than an edit of one MLP: gradients and moments of all embeddings."""
    given = editing.Work(small.model(vocab_size=60_000), small.a_split(), small.TEXTS, QUICK)
    before = small.weights(given.model)
    chosen = mask(given.model, ["mlp 2"])
    for each in (None, chosen):
        editing.warm_up(given, each)
    loop, ours = editing.cost(given, None), editing.cost(given, chosen)
    assert loop.seconds > ours.seconds > 0 and small.same(given.model, before)
    if sys.platform == "linux":
        assert loop.peak_bytes > ours.peak_bytes + 3 * 4 * 60_000 * given.model.d_model


def test_shares_of_the_plain_loop():
    seconds = {editing.PLAIN: (10, 12, 11), "lookup": (5, 7, 5.5), "late": (3.3, 3, 3.9), "everything": (12, 12, 1)}
    rows = [{"mode": "fp32", "variant": variant, "repeat": i, "seconds": s, "cpu_seconds": 2 * s, "bytes": 8 * s if i == 0 else math.nan}
            for variant, values in seconds.items() for i, s in enumerate(values)]
    table = editing.shares(pd.DataFrame(rows), memory_bar=0.4).set_index("variant")
    assert table["time"].to_dict() == pytest.approx({editing.PLAIN: 1, "lookup": 0.5, "late": 0.3, "everything": 12 / 11})
    assert table["cpu"].to_dict() == pytest.approx(table["time"].to_dict())
    assert table["memory"].to_dict() == pytest.approx({editing.PLAIN: 1, "lookup": 0.5, "late": 0.33, "everything": 1.2})
    assert table.loc["lookup", "time bar"] == "pass, aim 0.5 met" and table.loc["late", "time bar"] == "pass (bar 0.35)"
    assert table.loc["lookup", "memory bar"] == "FAIL (bar 0.4)" and table.loc["late", "memory bar"] == "pass (bar 0.4)"
    assert table.loc["everything", "time bar"] == table.loc["everything", "memory bar"] == ""


def test_a_bar_that_was_not_measured_is_not_passed():
    assert judge(math.nan, 0.5).startswith("not measured")
    assert judge(0.6, 0.7, 0.5) == "pass (bar 0.7)" and judge(0.8, 0.7, 0.5) == "FAIL (bar 0.7)" and judge(2.0) == ""


def test_saved_with_where_it_comes_from(tmp_path, capsys):
    table = pd.DataFrame({"variant": ["a", "b"], "seconds": [1.5, math.nan]})
    save(tmp_path / "new" / "x.json", {"costs": table}, model="some")
    written = json.loads((tmp_path / "new" / "x.json").read_text(), parse_constant=pytest.fail)
    assert written["tables"]["costs"] == [{"variant": "a", "seconds": 1.5}, {"variant": "b", "seconds": None}]
    assert written["given"] == {"model": "some"} and {"git", "packages", "threads", "platform"} <= written["provenance"].keys()
    assert "costs" in capsys.readouterr().out


# An edit with its evaluation, and what bf16 loses -----------------------------------------------------


def test_evaluated_is_the_edit_and_its_evaluation():
    given = editing.Work(attacks_cases.random_model(), attacks_cases.a_split(), attacks_cases.texts(), QUICK)
    table = editing.evaluated({"fp32": given}).set_index("variant")
    assert list(table.index) == list(editing.SECONDS_BARS)
    assert (table["total s"] == table["edit s"] + table["evaluation s"]).all()
    with editing.ours(given, editing.masks(given.model)["lookup"]).applied(given.model):
        rows = evaluate(given.model, given.split)
    wanted = rows[(rows["group"] == "forget") & (rows["format"] == "one_shot")]["prob_edit"].mean()
    assert table.loc["lookup", "edit"] == pytest.approx(wanted, abs=1e-9)


def test_pure_bf16_loses_small_updates_and_masters_keep_them():
    """An update below half the spacing of bf16 leaves a weight where it is; masters add such updates up."""
    settings = dataclasses.replace(QUICK, steps=20)
    works = {"fp32": work(settings=settings), "bf16": work(settings=settings, dtype=torch.bfloat16)}
    before = {mode: small.weights(given.model) for mode, given in works.items()}
    table = editing.precision(works, ladder=(3e-5, 3e-3)).set_index(["rate", "precision"])
    fp32, masters, pure = (table.xs(name, level="precision") for name in editing.PRECISIONS)
    assert fp32["moved"].min() > 0.99
    assert (pure["moved"] < masters["moved"]).all()
    assert pure.loc[3e-5, "moved"] < 0.5 * masters.loc[3e-5, "moved"] < 0.5 and masters.loc[3e-3, "moved"] > 0.9
    assert pure.loc[3e-5, "norm"] < masters.loc[3e-5, "norm"]
    assert all(small.same(given.model, before[mode]) for mode, given in works.items())
