"""Attribution patching against finite differences and known identities; integrated gradients are complete."""

import families
import localization_cases as cases
import numpy as np
import pytest
import torch

from helpers import tracing
from helpers.interventions import Intervention
from helpers.localization.attribution import attribute, completeness
from helpers.localization.counterfactual import pairs
from helpers.sites import TracingError


@pytest.fixture(scope="module", params=families.FAMILIES)
def model(request):
    return cases.model(request.param)


@pytest.fixture(scope="module")
def both(model):
    return pairs(model, cases.facts(12), "cloze")


def difference(model, prompts, answers, edits):
    pair = tracing.intervene(model, prompts, edits).logits.gather(1, answers)
    return pair[:, 0] - pair[:, 1]


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_attribution_is_the_slope_of_patching(model, direction):
    """Moving a component a small step towards the other run, in float64; prompts of equal length, so unpadded."""
    double = cases.model(model.name, torch.float64)
    facts = cases.facts(24, lengths=(2,)).where(lambda f: f.relation.name == "first")
    both = pairs(double, facts, "cloze")
    assert both.clean.mask.all()
    table = attribute(double, both, direction=direction)
    base, other = (both.clean, both.corrupted) if direction == "noise" else (both.corrupted, both.clean)
    step = 3e-4  # norms and softmax stay in float32 inside transformers
    checked = 0
    for component, rows in table.groupby("component", sort=False):
        kind, layer = rows["kind"].iloc[0], int(rows["layer"].iloc[0])
        if (kind, layer) not in (("head", 1), ("attn", 0), ("mlp", 1), ("mlp", 2)):
            continue
        heads = [int(rows["head"].iloc[0])] if kind == "head" else None
        site = {"head": "head", "attn": "attn_out", "mlp": "mlp_out"}[kind]
        start, end = (tracing.read(double, prompts, [(site, layer)])[site, layer] for prompts in (base, other))
        move = end - start if heads is None else (end - start)[:, :, heads]
        edits = [Intervention(site, layer, "all", sign * step * move, "add", heads=heads) for sign in (1, -1)]
        up, down = (difference(double, base, both.answers, [edit]) for edit in edits)
        np.testing.assert_allclose(rows["effect"], (up - down) / (2 * step), atol=5e-3, rtol=5e-3)
        checked += 1
    assert checked == 7
    np.testing.assert_allclose(table["score"], table["effect"].abs())
    for name, prompts in (("clean", both.clean), ("corrupt", both.corrupted)):
        own = difference(double, prompts, both.answers, []).numpy()
        np.testing.assert_allclose(table[f"ld_{name}"], np.tile(own, table["component"].nunique()), atol=1e-6)


def test_heads_add_up_to_their_attention(model, both):
    """z enters the residual linearly; not under a post-norm."""
    if model.name == "gemma2":
        pytest.skip("a post-norm stands between the heads and the residual")
    table = attribute(model, both)
    heads = table[table["kind"] == "head"].groupby(["layer", "subject", "relation"])["effect"].sum()
    whole = table[table["kind"] == "attn"].set_index(["layer", "subject", "relation"])["effect"]
    np.testing.assert_allclose(heads.loc[whole.index], whole, atol=1e-4)


@pytest.mark.parametrize("cut", [0, 1])
def test_integrated_gradients_are_complete_at_one_cut(model, both, cut):
    table = completeness(model, both, steps=24, cut=cut, rule="gauss")
    change = table["ld_corrupt"] - table["ld_clean"]
    gap = (table["attributed"] - change).abs()
    assert gap.sum() < 0.01 * change.abs().sum()
    assert (gap < 0.01 * change.abs().mean()).mean() > 0.8 and table["error"].median() < 0.01
    plain = completeness(model, both, steps=1, cut=cut)
    assert ((plain["attributed"] - change).abs().sum() > 0.05 * change.abs().sum()) or model.name == "neox"


def test_only_components_above_the_cut_are_scored():
    model = cases.model("llama")
    both = pairs(model, cases.facts(16), "cloze")
    table = attribute(model, both, cut=2)
    assert list(dict.fromkeys(table["component"])) == [*(f"head 2.{head}" for head in range(4)), "attn 2", "mlp 2"]
    # one gradient, taken in the clean run, is the same wherever the line would begin
    np.testing.assert_allclose(table["effect"], attribute(model, both)["effect"][-len(table) :], atol=1e-5)


def test_one_step_is_plain_attribution_and_many_agree(model, both):
    plain = attribute(model, both)
    np.testing.assert_allclose(attribute(model, both, rule="gauss")["effect"], plain["effect"], atol=1e-6)
    assert not np.allclose(attribute(model, both, steps=3)["effect"], plain["effect"], atol=1e-3)


def test_rules_meet_in_the_limit():
    model = cases.model("neox")
    both = pairs(model, cases.facts(16), "cloze")
    many = attribute(model, both, ("mlp",), steps=32, rule="right")["effect"]
    np.testing.assert_allclose(attribute(model, both, ("mlp",), steps=8, rule="gauss")["effect"], many, atol=0.05 * many.abs().max())
    back = attribute(model, both, ("mlp",), steps=8, rule="gauss", direction="denoise")["effect"]
    np.testing.assert_allclose(-back, attribute(model, both, ("mlp",), steps=8, rule="gauss")["effect"], atol=1e-5)


def test_batches_do_not_matter(model, both):
    one, other = attribute(model, both), attribute(model, both, batch_size=5)
    assert one["component"].tolist() == other["component"].tolist() and one["subject"].tolist() == other["subject"].tolist()
    np.testing.assert_allclose(one["effect"], other["effect"], atol=1e-4)
    assert all(parameter.grad is None for parameter in model.hf.parameters())


def test_errors():
    model = cases.model("llama")
    both = pairs(model, cases.facts(16), "cloze")
    with pytest.raises(ValueError, match=r"kinds \['embed'\]: allowed are head, attn, mlp"):
        attribute(model, both, ("embed",))
    for wrong in (dict(steps=0), dict(direction="back"), dict(rule="left")):
        with pytest.raises(ValueError, match="steps are 1 or more, directions denoise, noise, rules gauss, right"):
            attribute(model, both, **wrong)
    with pytest.raises(TracingError, match="cut 3: .* has layers 0 to 2"):
        attribute(model, both, cut=3)
