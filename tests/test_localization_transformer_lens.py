"""A second opinion: TransformerLens on the same tiny Llama, wherever it computes the same quantity."""

import copy

import families
import localization_cases as cases
import numpy as np
import pytest
from transformers import AutoTokenizer

from helpers.localization.attribution import attribute
from helpers.localization.counterfactual import pairs
from helpers.localization.lens import direct_attribution, logit_lens
from helpers.localization.patching import patch
from helpers.localization.second_opinion import lens_residual_patching

FACT = ["subject", "relation"]


@pytest.fixture(scope="module")
def boot(tmp_path_factory):
    """A function that makes a TransformerLens model of a copy of the tiny Llama."""
    bridge = pytest.importorskip("transformer_lens.model_bridge")
    folder = tmp_path_factory.mktemp("llama")
    families.tokenizer().save_pretrained(folder)
    hf = families.build("llama")
    hf.config.save_pretrained(folder)
    return lambda: bridge.TransformerBridge.boot_transformers(
        str(folder), hf_model=copy.deepcopy(hf), tokenizer=AutoTokenizer.from_pretrained(folder)
    )


@pytest.fixture(scope="module")
def model():
    return cases.model("llama")


@pytest.fixture(scope="module")
def both(model):
    """Prompts of one length without padding, and subjects of two tokens: TransformerLens knows columns, not roles."""
    facts = cases.facts(24, lengths=(2,)).where(lambda f: f.relation.name == "first")
    found = pairs(model, facts, "cloze")
    assert found.clean.mask.all() and len(found) == 12
    return found


# column of the role in "Fact : s s w3 w4 w5 w6 w7"
ROLES = {"subject first": 2, "subject last": 3, "after subject 1": 4, "after subject 2": 5, "after subject 3": 6, "last": 8}


def test_activation_patching(boot, model, both):
    from transformer_lens import patching

    bridge, answers = boot(), both.answers
    _, cache = bridge.run_with_cache(both.clean.tokens)

    def ld(logits):
        pair = logits[:, -1].gather(1, answers)
        return pair[:, 0] - pair[:, 1]

    def theirs(sweep):
        # (layer, column, fact) or (layer, head, fact)
        return sweep(bridge, both.corrupted.tokens, cache, ld, reduce="none").values.numpy()

    sweeps = {
        "resid_pre": patching.get_act_patch_resid_pre,
        "attn_out": patching.get_act_patch_attn_out,
        "mlp_out": patching.get_act_patch_mlp_out,
    }
    table = patch(model, both, tuple(sweeps), tuple(ROLES)).set_index(["site", "layer", "position"])["ld_patched"]
    for site, sweep in sweeps.items():
        values = theirs(sweep)
        for layer in range(3):
            for position, column in ROLES.items():
                np.testing.assert_allclose(table[site, layer, position], values[layer, column], atol=1e-4)
    heads = patch(model, both, ("head",), ("all",)).set_index(["layer", "head"])["ld_patched"]
    values = theirs(patching.get_act_patch_attn_head_out_all_pos)
    for layer in range(3):
        for head in range(4):
            np.testing.assert_allclose(heads[layer, head], values[layer, head], atol=1e-4)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_second_opinion_on_the_residual_stream(family):
    """Prompts of several lengths, of which it takes the commonest kind, on every family."""
    model = cases.model(family)
    twins = pairs(model, cases.facts(24), "cloze")
    theirs = lens_residual_patching(model, twins, limit=4)
    assert 2 * 3 <= len(theirs) <= 2 * 3 * 4 and theirs["ld_patched"].std() > 0.1
    both = patch(model, twins, ("resid_pre",)).merge(theirs, on=[*FACT, "layer", "position"], suffixes=("", "_lens"))
    assert len(both) == len(theirs)
    np.testing.assert_allclose(both["ld_patched"], both["ld_patched_lens"], atol=1e-4)


def test_attribution_patching(boot, model, both):
    """Theirs takes the gradient in the corrupted run and averages signed effects over prompts."""
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    bridge, some = boot(), both[:3]
    for parameter in bridge.parameters():
        parameter.requires_grad_()  # without one, their metric has no graph
    table = attribute(model, some, ("head", "mlp"), direction="denoise")
    for row in range(3):
        true, alternative = some.answers[row].tolist()

        def metric(logits):
            return logits[0, -1, true] - logits[0, -1, alternative]

        result = attribution_patch(bridge, some.clean.tokens[row : row + 1], some.corrupted.tokens[row : row + 1], metric)
        theirs = {}
        for node, score in result.node_scores.items():
            name = {"attn_head_out": f"head {node.layer}.{node.head}", "mlp_out": f"mlp {node.layer}"}.get(node.kind)
            theirs[name] = theirs.get(name, 0.0) + score  # over positions
        ours = table[table["subject"] == some.clean.facts[row].subject].set_index("component")["effect"]
        assert len(ours) == 15
        np.testing.assert_allclose(ours, [theirs[name] for name in ours.index], atol=1e-4)


def test_direct_logit_attribution(boot, model, both):
    from transformer_lens.tools.analysis import direct_logit_attribution

    bridge = boot()
    bridge.enable_compatibility_mode()
    table = direct_attribution(model, both.clean).set_index("component")["score"]
    ids = dict(answer_tokens=both.answers[:, 0], incorrect_tokens=both.answers[:, 1])
    parts = direct_logit_attribution(bridge, both.clean.tokens, unit="component", **ids)
    heads = direct_logit_attribution(bridge, both.clean.tokens, unit="head", **ids)
    checked = 0
    for found, name_of in ((parts, _component), (heads, _head)):
        for label, values in zip(found.labels, found.attribution):
            if (name := name_of(label)) is not None:
                np.testing.assert_allclose(table[name], values.detach().flatten(), atol=1e-4)
                checked += 1
    assert checked == 1 + 6 + 12


def test_logit_lens(boot, model, both):
    from transformer_lens.tools.analysis import logit_lens as their_lens

    result = their_lens(boot(), both.clean.tokens, targets=both.answers[:, 0])
    table = logit_lens(model, both.clean, ("last",))
    for layer in range(4):
        rows = table[table["layer"] == layer]
        np.testing.assert_allclose(rows["logit_true"], result.readout.values[layer].detach().flatten(), atol=1e-4)
        assert rows["rank_true"].tolist() == result.readout.target_ranks[layer].flatten().tolist()


def _component(label: str) -> str | None:
    """`0_attn_out` → `attn 0`."""
    if label == "embed":
        return label
    layer, _, kind = label.partition("_")
    return f"{kind.removesuffix('_out')} {layer}" if layer.isdigit() else None


def _head(label: str) -> str | None:
    """`L1H2` → `head 1.2`."""
    layer, _, head = label.removeprefix("L").partition("H")
    return f"head {layer}.{head}" if layer.isdigit() and head.isdigit() else None
