"""Activation patching, causal tracing and knock-out: against brute force, and in cases whose answer is known."""

import families
import localization_cases as cases
import numpy as np
import pandas as pd
import pytest
import torch

from helpers import tracing
from helpers.interventions import Intervention
from helpers.localization import causal_tracing, engine
from helpers.localization.causal_tracing import noise_scale, trace_components, trace_positions
from helpers.localization.counterfactual import Pairs, pairs
from helpers.localization.knockout import knock_out
from helpers.localization.patching import around, patch
from helpers.localization.positions import locate
from helpers.localization.recovery import add_scores, summarise
from helpers.models import Component, ModelError
from helpers.sites import TracingError

FACT = ["subject", "relation"]
KEY = [*FACT, "site", "layer", "head", "position"]


@pytest.fixture(scope="module", params=families.FAMILIES)
def model(request):
    return cases.model(request.param)


@pytest.fixture(scope="module")
def both(model):
    return pairs(model, cases.facts(12), "cloze")


def difference(model, prompts, answers, edits=()):
    """LD and p(true) of each prompt, by tracing."""
    logits = tracing.intervene(model, prompts, edits).logits
    pair = logits.gather(1, answers)
    return (pair[:, 0] - pair[:, 1]).double().numpy(), logits.softmax(-1).gather(1, answers[:, :1])[:, 0].double().numpy()


def same_tables(one, two):
    pd.testing.assert_frame_equal(one.reset_index(drop=True), two.reset_index(drop=True), atol=1e-4, rtol=1e-3)


# Activation patching --------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patches_equal_brute_force(model, both, direction):
    table = patch(model, both, ("resid_pre", "attn_out", "mlp_out", "head"), direction=direction, after=1, batch_size=5)
    base, source = (both.corrupted, both.clean) if direction == "denoise" else (both.clean, both.corrupted)
    found = locate(both.clean, 1)
    ends = {name: difference(model, prompts, both.answers) for name, prompts in (("clean", both.clean), ("corrupt", both.corrupted))}
    checked = 0
    for (site, layer, head, position), rows in table.groupby(["site", "layer", "head", "position"], dropna=False):
        if (layer + len(position) + (0 if pd.isna(head) else head)) % 7:  # some of every kind
            continue
        value = tracing.read(model, source, [(site, layer)])[site, layer]
        heads = None if pd.isna(head) else [head]
        edit = Intervention(site, layer, found[position], value if heads is None else value[:, :, heads], heads=heads)
        ld, p = difference(model, base, both.answers, [edit])
        has = found[position].any(1).numpy()
        np.testing.assert_allclose(rows["ld_patched"], ld[has], atol=1e-4)
        np.testing.assert_allclose(rows["p_patched"], p[has], atol=1e-5)
        for name, (ld_end, p_end) in ends.items():
            np.testing.assert_allclose(rows[f"ld_{name}"], ld_end[has], atol=1e-4)
            np.testing.assert_allclose(rows[f"p_{name}"], p_end[has], atol=1e-5)
        assert rows["subject"].tolist() == [f.subject for f, h in zip(both.clean.facts, has) if h]
        checked += 1
    assert checked > 10
    start, end = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    expected = (table["ld_patched"] - table[f"ld_{start}"]) / (table[f"ld_{end}"] - table[f"ld_{start}"])
    np.testing.assert_allclose(table["score"].dropna(), expected[table["score"].notna()])


def test_clean_into_clean_changes_nothing(model, both):
    twins = Pairs(both.clean, both.clean)
    table = patch(model, twins, ("resid_pre", "attn_out", "mlp_out", "head"))
    np.testing.assert_allclose(table["ld_patched"], table["ld_clean"], atol=1e-5)
    assert table["score"].isna().all() and table["p_score"].isna().all()  # nothing to bring back
    assert (summarise(table, ("site",))["n_undefined"] == summarise(table, ("site",))["n"]).all()


def test_the_whole_residual_brings_everything_back(model, both):
    first = patch(model, both, ("resid_pre",), ("all",), layers=[0])
    last = patch(model, both, ("resid_pre",), ("all", "last"), layers=[2], direction="noise")
    for table in (first, last[last["position"] == "all"]):
        np.testing.assert_allclose(table["score"].dropna(), 1, atol=1e-3)
        np.testing.assert_allclose(table["p_score"].dropna(), 1, atol=1e-3)
    assert summarise(first, ("site",))["score"][0] == pytest.approx(1, abs=1e-5)
    subject = patch(model, both, ("resid_pre",), ("subject",), layers=[0])
    np.testing.assert_allclose(subject["ld_patched"], subject["ld_clean"], atol=1e-5)  # prompts differ nowhere else


def test_what_lies_before_the_subject_does_nothing(model, both):
    table = patch(model, both, ("resid_pre", "mlp_out", "head"), ("before subject",))
    np.testing.assert_allclose(table["ld_patched"], table["ld_corrupt"], atol=1e-5)


def test_all_heads_or_one_at_all_positions(model, both):
    """Components are named as `Component` writes them; the last position alone does less than all."""
    table = patch(model, both, ("head", "mlp_out"), ("all", "last"), layers=[1])
    assert list(dict.fromkeys(table["component"])) == [*(f"head 1.{h}" for h in range(4)), "mlp 1"]
    assert all(Component.parse(name).layer == 1 for name in table["component"])
    assert len(table) == 5 * 2 * len(both)
    assert not np.allclose(*(table.loc[table["position"] == p, "ld_patched"] for p in ("all", "last")))


def test_batches_order_and_padding_do_not_matter(model, both):
    table = patch(model, both, ("resid_pre", "mlp_out"), layers=[1])
    same_tables(table, patch(model, both, ("resid_pre", "mlp_out"), layers=[1], batch_size=5))
    order = torch.arange(len(both) - 1, -1, -1)
    turned = patch(model, both[order], ("resid_pre", "mlp_out"), layers=[1])
    same_tables(table.sort_values(KEY), turned.sort_values(KEY))


def test_out_of_memory_halves_the_chunk(model, both, monkeypatch):
    table, made = patch(model, both, ("mlp_out",), ("all",)), engine.Run.__init__

    def scarce(self, model, batch, *rest, **more):
        if len(batch) > 6:
            raise torch.OutOfMemoryError("out of memory")
        made(self, model, batch, *rest, **more)

    monkeypatch.setattr(engine.Run, "__init__", scarce)
    same_tables(table, patch(model, both, ("mlp_out",), ("all",)))


def test_summary_is_a_ratio_of_means():
    rows = {"ld_clean": [4.0, 2.0, 1.0], "ld_corrupt": [0.0, 0.0, 1.0], "ld_patched": [2.0, 0.0, 5.0]}
    rows |= {"p_clean": [0.8, 0.8, 0.5], "p_corrupt": [0.0, 0.4, 0.5], "p_patched": [0.4, 0.4, 0.5]}
    table = add_scores(pd.DataFrame({"component": ["mlp 1"] * 3} | rows))
    assert table["score"].tolist()[:2] == [0.5, 0.0] and np.isnan(table["score"][2])
    row = summarise(table).iloc[0]
    assert row["score"] == pytest.approx((7 / 3 - 1 / 3) / (7 / 3 - 1 / 3)) and row["mean_score"] == 0.25
    assert row["p_score"] == pytest.approx((1.3 - 0.9) / (2.1 - 0.9)) and (row["n"], row["n_undefined"]) == (3, 1)


def test_errors_of_patching():
    model = cases.model("llama")
    both = pairs(model, cases.facts(16), "cloze")
    with pytest.raises(TracingError, match="site 'q': allowed are resid_pre, attn_out"):
        patch(model, both, ("q",))
    with pytest.raises(TracingError, match="layer 3: llama has layers 0 to 2"):
        patch(model, both, layers=[3])
    with pytest.raises(ValueError, match="direction 'clean': allowed are denoise, noise"):
        patch(model, both, direction="clean")
    with pytest.raises(ValueError, match=r"positions \['end'\]: allowed are"):
        patch(model, both, positions=["end"])


# Causal tracing -------------------------------------------------------------------------------------


def test_restoring_equals_brute_force(model, monkeypatch):
    """With the noise made known, every number by tracing alone: windows, heads and all positions."""
    prompts = cases.prompts(8)
    answers = prompts.option_ids[:, :2]
    draw = torch.randn(8, prompts.tokens.shape[1], 32, generator=torch.Generator().manual_seed(1))
    by_text = {}
    for row, where in enumerate(locate(prompts)["subject"]):
        by_text[prompts.texts[row]] = draw[row, where]

    def known(batch, width, seeds):
        noise = torch.zeros(*batch.tokens.shape, width)
        for row, where in enumerate(batch.at("subject")):
            noise[row, where] = by_text[seeds[row].split("|")[-1]]
        return noise

    monkeypatch.setattr(causal_tracing, "_noise", known)
    subject, scale = locate(prompts)["subject"], 3 * noise_scale(model, prompts)
    noised = Intervention("embed", 0, subject, scale * draw, "add")
    sites = [(site, layer) for site in ("attn_out", "mlp_out", "head", "resid_pre") for layer in range(3)]
    clean = tracing.read(model, prompts, sites)
    by_position = trace_positions(model, prompts, ("resid_pre", "mlp_out"), ("subject last", "last"), window=2, samples=2, batch_size=3)
    by_component = trace_components(model, prompts, samples=1, batch_size=3)
    # the noise is the same in both samples, so their mean is either
    for table, window in ((by_position, 2), (by_component, 1)):
        for (site, layer, head, position), rows in table.groupby(["site", "layer", "head", "position"], dropna=False):
            where = locate(prompts)[position]
            heads = None if pd.isna(head) else [head]
            edits = [
                Intervention(site, l, where, clean[site, l] if heads is None else clean[site, l][:, :, heads], heads=heads)
                for l in (around(layer, window, 3) if site != "resid_pre" else [layer])
            ]
            ld, p = difference(model, prompts, answers, [noised, *edits])
            np.testing.assert_allclose(rows["ld_patched"], ld, atol=1e-4)
            np.testing.assert_allclose(rows["p_patched"], p, atol=1e-5)
    ld, p = difference(model, prompts, answers, [noised])
    np.testing.assert_allclose(by_component["ld_corrupt"], np.tile(ld, 18), atol=1e-4)
    np.testing.assert_allclose(by_component["p_corrupt"], np.tile(p, 18), atol=1e-5)
    ld, _ = difference(model, prompts, answers)
    np.testing.assert_allclose(by_component["ld_clean"], np.tile(ld, 18), atol=1e-4)


def test_the_scale_is_that_of_the_embedding_module(model):
    """Gemma multiplies its embeddings by √d: noise without it would be 5.7 times too weak here."""
    prompts = cases.prompts(6)
    tokens = torch.cat([row[a:b] for row, (a, b) in zip(prompts.tokens, prompts.subject.tolist())])
    factor = 32**0.5 if model.name.startswith("gemma") else 1
    assert noise_scale(model, prompts) == pytest.approx(factor * model.embed.weight[tokens].double().std().item(), rel=1e-5)


def test_restoring_everything_recovers_all_of_it(model):
    prompts = cases.prompts(8)
    table = trace_positions(model, prompts, ("resid_pre",), ("subject", "all"), layers=[0])
    assert table["score"].notna().sum() > 10
    np.testing.assert_allclose(table["score"].dropna(), 1, atol=1e-3)
    np.testing.assert_allclose(table["p_score"].dropna(), 1, atol=1e-3)
    assert (table["ld_corrupt"] - table["ld_clean"]).abs().max() > 0.1


def test_noise_depends_on_seed_and_fact_alone():
    model, prompts = cases.model("gemma2"), cases.prompts(8)
    table = trace_components(model, prompts, ("mlp",), seed=3)
    same_tables(table, trace_components(model, prompts, ("mlp",), seed=3, batch_size=3))
    assert not np.allclose(table["ld_corrupt"], trace_components(model, prompts, ("mlp",), seed=4)["ld_corrupt"])
    scale = noise_scale(model, prompts) / noise_scale(model, prompts[[2, 5]])
    few = trace_components(model, prompts[[2, 5]], ("mlp",), seed=3, noise=3 * scale)
    subjects = few["subject"].unique()
    same_tables(few, table[table["subject"].isin(subjects)])


def test_noise_too_weak_to_matter_leaves_nothing_to_recover():
    model, prompts = cases.model("llama"), cases.prompts(6)
    table = trace_components(model, prompts, ("mlp",), noise=1e-7)
    assert table["score"].isna().all() and table["p_score"].isna().all()
    for wrong in (dict(noise=0), dict(samples=0)):
        with pytest.raises(ValueError, match="at least one sample of noise above 0"):
            trace_components(model, prompts, **wrong)
    with pytest.raises(ValueError, match="window 0: at least one layer"):
        trace_positions(model, prompts, window=0)
    with pytest.raises(ValueError, match=r"kinds \['attention'\]: allowed are attn, mlp, head"):
        trace_components(model, prompts, ("attention",))


def test_windows_are_cut_at_the_ends():
    assert [around(layer, 3, 5) for layer in (0, 2, 4)] == [(0, 1), (1, 2, 3), (3, 4)]
    assert around(2, 1, 5) == (2,) and around(2, 2, 5) == (1, 2) and around(2, 0, 5) == ()


# Knock-out ------------------------------------------------------------------------------------------


def test_cuts_equal_tracing(model):
    prompts = cases.prompts(8)
    table = knock_out(model, prompts, ("subject", "subject middle"), window=(1, 2), batch_size=3)
    p_clean = tracing.read(model, prompts).logits.softmax(-1).gather(1, prompts.answer_ids[:, None])[:, 0].numpy()
    for (keys, window, layer), rows in table.groupby(["keys", "window", "layer"]):
        span, where = around(layer, window, 3), locate(prompts)[keys]
        logits = tracing.knock_out_attention(model, prompts, span, "last", where).logits
        p = logits.softmax(-1).gather(1, prompts.answer_ids[:, None])[:, 0].numpy()
        has = where.any(1).numpy()
        np.testing.assert_allclose(rows["p_cut"], p[has], atol=1e-5)
        np.testing.assert_allclose(rows["score"], (p / p_clean - 1)[has], atol=1e-3)
        assert (rows["first"].iloc[0], rows["last"].iloc[0]) == (span[0], span[-1])
    assert table.groupby("keys").size().to_dict() == {"subject": 48, "subject middle": 24}
    assert table["score"].abs().max() > 0.01


def test_a_window_of_nothing_changes_nothing(model):
    table = knock_out(model, cases.prompts(6), window=0)
    assert (table["score"] == 0).all() and (table["p_cut"] == table["p_clean"]).all() and table["first"].isna().all()


def test_errors_of_knock_out():
    model, prompts = cases.model("llama"), cases.prompts(6)
    with pytest.raises(ValueError, match="widths are 0 or more"):
        knock_out(model, prompts, window=-1)
    with pytest.raises(ModelError, match=r"layers \[3\]: llama has layers 0 to 2"):
        knock_out(model, prompts, layers=[3])
    with pytest.raises(ValueError, match=r"positions \['subjects'\]"):
        knock_out(model, prompts, ("subjects",))
