"""The two rules that choose lookup layers: on made-up evidence, on the paper's probe curves, and end to end."""

from types import SimpleNamespace

import localization_cases as cases
import numpy as np
import pandas as pd
import pytest
import torch

from helpers import tracing
from helpers.localization import fact_lookup
from helpers.localization.counterfactual import pairs as make_pairs
from helpers.localization.evidence import component_scores
from helpers.localization.fact_lookup import (
    attention_cuts,
    candidates,
    counterfact,
    extraction_heads,
    left_at,
    lowest_layer,
    probe_curves,
    sports,
)
from helpers.localization.path_patching import receiver_paths
from helpers.masks import SelectionError, mask
from helpers.sites import TracingError

# Probes at the name after each block (spec section 3.1), with the majority class, football, for the embeddings.
CHANCE = 583 / 1559
GEMMA_7B = [CHANCE, 0.44, 0.48, 0.63, 0.85, 0.97, 0.97, 1.0]
GEMMA_2 = [CHANCE, 0.50, 0.57, 0.73, 0.97, 0.99, 1.0]
LLAMA_3 = [CHANCE, 0.42, 0.63, 0.92, 1.0]


@pytest.fixture(scope="module")
def model():
    """No attention below layer 2, so that the heads that matter have MLPs below them."""
    model = cases.model("llama", num_hidden_layers=5)
    for layer in (0, 1):
        model.part("o", layer).weight.zero_()
    return model


@pytest.fixture(scope="module")
def pairs(model):
    return make_pairs(model, cases.facts(32), "paraphrase", which=0)


def test_answers_that_a_probe_can_be_fitted_to():
    """With one of their subjects held out two are left."""
    everyone, quota = cases.facts(32), {"w50": 8, "w51": 3, "w52": 2, "w53": 1}
    place = {fact.key: i for answer in quota for i, fact in enumerate(everyone.where(lambda f: f.answer == answer))}
    some = everyone.where(lambda fact: place[fact.key] < quota[fact.answer])
    assert fact_lookup.probeable(some).counts() == {"w50": 8, "w51": 3}
    assert fact_lookup.probeable(some, 2).counts() == {"w50": 8, "w51": 3, "w52": 2}
    assert not len(fact_lookup.probeable(some, 4))  # one answer alone tells nothing


def test_published_first_layers():
    """Published choices begin at 2, 2 and 1; they end later than the probe does (7, 6 and 4), chosen by hand."""
    assert [candidates(curve, CHANCE) for curve in (GEMMA_7B, GEMMA_2, LLAMA_3)] == [(2, 4), (2, 3), (1, 3)]


def test_candidates():
    assert candidates([0.3, 0.3, 0.5, 0.7, 0.9, 0.9], 0.3) == (2, 3)
    assert candidates([0.3, 0.3, 0.5, 0.7, 0.9, 0.9], 0.3, begin=0.1, end=0.5) == (1, 2)
    assert candidates([0.9, 0.9, 0.9], 0.3) == (0, 0)  # readable from the embeddings on
    with pytest.raises(ValueError, match="no layer is read above chance"):
        candidates([0.3, 0.2, 0.3], 0.3)


def test_left_at():
    assert left_at([0.0, 0.2, 0.6, 0.95, 1.0]) == 3
    assert left_at([0.0, 0.95, 0.6, 0.95, 1.0]) == 3  # it must stay there
    assert left_at([0.95, 1.0]) == 0 and left_at([0.0, 0.0]) == 2


def test_lowest_layer():
    scores = pd.Series({"head 4.1": 1.0, "head 3.0": -0.8, "head 1.2": 0.06, "head 0.3": -0.03})
    assert lowest_layer(scores) == 3 and lowest_layer(scores, 0) == 0 and lowest_layer(scores, 0.02) == 1


def planted(monkeypatch, name, kept, heads, n_facts=8):
    """Evidence with these curves, the same for every fact: probe at the name, kept(ℓ), head scores."""
    last = [0.3] * len(name)
    probe = [
        {"position": at, "layer": layer, "fold": fold, "accuracy": accuracy, "chance": 0.3}
        for at, curve in {"name": name, "last": last}.items()
        for layer, accuracy in enumerate(curve)
        for fold in range(2)
    ]
    base = {"ld_clean": 4.0, "ld_corrupt": 0.0}
    cuts = [
        {"fact": fact, "subject": fact, "from_layer": layer, "ld_patched": 4 * share, **base}
        for layer, share in enumerate(kept) for fact in range(n_facts)
    ]
    paths = [
        {"component": head, "subject": fact, "ld_patched": 4 * score, **base}
        for head, score in heads.items() for fact in range(n_facts)
    ]
    for function, rows in {"probe_curves": probe, "attention_cuts": cuts, "head_paths": paths}.items():
        monkeypatch.setattr(fact_lookup, function, lambda *_, rows=rows: pd.DataFrame(rows))
    return sports(SimpleNamespace(n_layers=len(name) - 1), None, None, n_heads=3)


NAME = [0.3, 0.35, 0.6, 0.8, 0.85, 0.95, 1.0, 1.0, 1.0]  # rises in MLPs 1 to 4
KEPT = [0.0, 0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 0.95, 1.0]  # is read up to layer 6
HEADS = {"head 7.0": 0.5, "head 6.1": -0.3, "head 5.1": 0.2, "head 0.2": 0.01, "head 1.2": 0.0}


def test_sports_rule(monkeypatch):
    found = planted(monkeypatch, NAME, KEPT, HEADS)
    assert found.layers == (1, 2, 3, 4) and found.units == ["mlp 1", "mlp 2", "mlp 3", "mlp 4"]
    assert found.heads == ("head 7.0", "head 6.1", "head 5.1") and found.extraction_layers == (5, 6, 7)
    assert found.evidence["chosen"].tolist() == [False, True, True, True, True, False, False, False]
    assert found.evidence["reason"][0].startswith("name probe: rises between 40% and 90% in layers 1 to 4")
    assert found.evidence["name_accuracy"].tolist() == NAME[1:]
    assert set(found.tables) == {"probes", "attention", "heads"}
    np.testing.assert_allclose(found.evidence["kept_if_cut_above"], KEPT[1:])
    np.testing.assert_allclose(found.evidence["head_score"], [0, 0, 0, 0, 0, 0.2, 0.3, 0.5])


def test_sports_rule_takes_attention_and_heads_into_account(monkeypatch):
    found = planted(monkeypatch, NAME, [0.0, 0.0, 0.1, 0.92, 0.95, 1, 1, 1, 1], HEADS)
    assert found.layers == (1,)
    assert found.evidence["reason"][2].startswith("attention: the fact has left the name")
    found = planted(monkeypatch, NAME, KEPT, HEADS | {"head 3.3": 0.4})
    assert found.layers == (1, 2)
    assert found.evidence["reason"][3] == "heads: not below the extraction layers, which begin at 3"
    none = planted(monkeypatch, NAME, KEPT, HEADS | {"head 1.3": 0.4})
    assert none.layers == () and none.evidence["reason"].notna().all()


def test_attention_cuts_equal_traced_passes(model, pairs):
    found = attention_cuts(model, pairs, batch_size=7)
    batch = pairs.clean
    after = (torch.arange(batch.tokens.shape[1]) >= batch.subject[:, 1:]) & batch.mask.bool()
    for start in (0, 2, 4):
        cut = tracing.knock_out_attention(model, batch, range(start, 5), after, "subject")
        chosen = cut.logits.gather(1, pairs.answers)
        patched = torch.tensor(found.loc[found["from_layer"] == start, "ld_patched"].to_numpy())
        torch.testing.assert_close(patched, (chosen[:, 0] - chosen[:, 1]).double(), atol=1e-4, rtol=1e-4)
    clean = tracing.read(model, batch).logits.gather(1, pairs.answers)
    ends = found[found["from_layer"] == 5]
    patched = torch.tensor(ends["ld_patched"].to_numpy())
    torch.testing.assert_close(patched, (clean[:, 0] - clean[:, 1]).double(), atol=1e-4, rtol=1e-4)
    assert (ends["ld_patched"] == ends["ld_clean"]).all()
    kept = component_scores(found.rename(columns={"from_layer": "component"}))
    assert kept[0] == 0 and kept[5] == 1


def test_counterfact_follows_its_rule(model, pairs):
    found = counterfact(model, pairs, n_heads=4, threshold=0.05, negligible=0)
    scores = component_scores(found.tables["heads"])
    assert list(found.heads) == scores.abs().sort_values(ascending=False).index[:4].tolist()
    lowest = min(int(head.split()[1].split(".")[0]) for head in found.heads)
    assert found.extraction_layers[0] == lowest
    again = component_scores(receiver_paths(model, pairs, found.heads))
    evidence = found.evidence.set_index("layer")
    np.testing.assert_allclose(evidence["score"], again.to_numpy())
    for layer in range(5):
        assert evidence["chosen"][layer] == (abs(again[f"mlp {layer}"] - again["mlp 4"]) > 0.05)
        assert layer < lowest or (again[f"mlp {layer}"] == 0 and "not below" in evidence["reason"][layer])
    assert found.layers == tuple(evidence.index[evidence["chosen"]]) and len(found.layers)
    assert mask(model, found.units).layers == found.layers


def test_counterfact_calibrated(model, pairs):
    found = counterfact(model, pairs, threshold="calibrated", receiver="heads", n_heads=4, samples=200)
    assert found.evidence.equals(
        counterfact(model, pairs, threshold="calibrated", receiver="heads", n_heads=4, samples=200).evidence
    )
    excluded = (found.evidence["low"] > 0) | (found.evidence["high"] < 0)
    assert (found.evidence["chosen"] == excluded).all()
    assert (found.evidence["low"] <= found.evidence["difference"]).all()
    heads = extraction_heads(found.tables["heads"], "calibrated", level=0.3, samples=200)
    wide = extraction_heads(found.tables["heads"], "calibrated", level=0.1, samples=200)
    assert 0 < len(heads) < 12 and set(heads) <= set(wide)
    with pytest.raises(TracingError, match="n_heads 'calibrated': no head is chosen"):
        extraction_heads(found.tables["heads"].assign(ld_patched=0, ld_corrupt=0), "calibrated", samples=50)


def test_sports_end_to_end(model, pairs):
    prompts = cases.prompts(40, format="cloze")
    read = probe_curves(model, prompts)
    assert set(read["position"]) == {"name", "last"} and read["layer"].max() == 5
    found = sports(model, pairs, prompts, samples=100)
    assert len(found.evidence) == 5 and found.layers == tuple(found.evidence.loc[found.evidence["chosen"], "layer"])
    assert found.evidence.equals(sports(model, pairs, prompts, samples=100).evidence)


def test_nothing_below_the_heads():
    model = cases.model("llama", num_hidden_layers=1)
    found = counterfact(model, make_pairs(model, cases.facts(16), "paraphrase", which=0))
    assert found.layers == () and found.evidence["reason"][0] == "not below the extraction layers, which begin at 0"
    with pytest.raises(TracingError, match="a prompt ends with its subject"):
        ends = cases.facts(16).where(lambda fact: fact.relation is cases.FIRST)
        attention_cuts(model, make_pairs(model, ends, "paraphrase", which=1))
    with pytest.raises(SelectionError, match="empty selection"):
        mask(model, found.units)
