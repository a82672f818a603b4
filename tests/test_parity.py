"""Every supported architecture against plain PyTorch: a causal trace and an attribution here; bf16 against fp32.

The other two stand elsewhere, with references as plain as these: a training step in `test_finetune.test_equals_plain_training`, path
patching in `test_path_patching.test_heads_to_logits_equal_a_rerun` and its neighbours.
"""

from contextlib import ExitStack

import families
import localization_cases as cases
import numpy as np
import pytest
import torch

from helpers import facts as bundled
from helpers.localization.attribution import attribute
from helpers.localization.causal_tracing import subject_noise, trace_components
from helpers.localization.counterfactual import pairs
from helpers.localization.evidence import component_scores
from helpers.localization.path_patching import head_paths
from helpers.models import load_model

POST_NORMS = {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}


@pytest.fixture(scope="module", params=families.FAMILIES)
def family(request):
    return request.param


def places(hf):
    """(name, layer) -> (module, whether its input is meant) for what attention and MLP add to the residual and what heads give."""
    found = {}
    for layer, block in enumerate(hf.base_model.layers):
        attention = getattr(block, "attention", None) or block.self_attn
        parts = {"attn": attention, "mlp": block.mlp}
        if hasattr(block, "post_feedforward_layernorm"):
            parts = {name: getattr(block, POST_NORMS[name]) for name in parts}
        found |= {(name, layer): (module, False) for name, module in parts.items()}
        found["head", layer] = getattr(attention, "dense", None) or attention.o_proj, True
    return found


def passed(hf, prompts, change):
    """(logits at the last tokens, values) of a pass in which `change(key, value)` replaces the values at all places, and at "embed"."""
    seen = {}

    def on_input(key):
        def hook(module, inputs):
            seen[key] = change(key, inputs[0])
            return (seen[key], *inputs[1:])

        return hook

    def on_output(key):
        def hook(module, inputs, output):
            seen[key] = change(key, output[0] if isinstance(output, tuple) else output)
            return (seen[key], *output[1:]) if isinstance(output, tuple) else seen[key]

        return hook

    with ExitStack() as stack:
        for key, (module, is_input) in places(hf).items():
            register = module.register_forward_pre_hook if is_input else module.register_forward_hook
            stack.callback(register((on_input if is_input else on_output)(key)).remove)
        stack.callback(hf.get_input_embeddings().register_forward_hook(on_output("embed")).remove)
        out = hf(input_ids=prompts.tokens, attention_mask=prompts.mask, position_ids=prompts.position_ids, use_cache=False).logits
    return out[torch.arange(len(prompts.last)), prompts.last], seen


def difference(logits, answers):
    pair = logits.gather(1, answers)
    return pair[:, 0] - pair[:, 1]


def test_causal_tracing(family):
    model, hf = cases.model(family), cases.untouched(family)
    prompts = cases.prompts(8, side="left")
    answers, seed = prompts.option_ids[:, :2], 5
    table = trace_components(model, prompts, ("attn", "mlp"), samples=2, seed=seed, batch_size=3)
    logits, clean = passed(hf, prompts, lambda key, value: value)
    subject = torch.zeros_like(prompts.mask, dtype=torch.bool)
    for row, (start, stop) in enumerate(prompts.subject.tolist()):
        subject[row, start:stop] = True
    scale = 3 * clean["embed"][subject].double().std()
    expected = {}
    for key in [None, *(key for key in places(hf) if key[0] != "head")]:
        samples = []
        for sample in range(2):
            noise = (scale * subject_noise(prompts, 32, seed, sample)).to(clean["embed"])

            def change(where, value, key=key, noise=noise):
                if where == "embed":
                    return value + noise
                return clean[where] if where == key else value

            samples.append(difference(passed(hf, prompts, change)[0], answers))
        expected[key] = torch.stack(samples).mean(0)
    for (kind, layer), rows in table.groupby([table["component"].str.split().str[0], "layer"]):
        np.testing.assert_allclose(rows["ld_patched"], expected[kind, layer], atol=1e-4)
        np.testing.assert_allclose(rows["ld_corrupt"], expected[None], atol=1e-4)
        np.testing.assert_allclose(rows["ld_clean"], difference(logits, answers), atol=1e-4)
    assert (expected["mlp", 0] - expected[None]).abs().max() > 0.01  # there was something to restore


def test_attribution(family):
    model, hf = cases.model(family), cases.untouched(family)
    both = pairs(model, cases.facts(12), "cloze")
    table = attribute(model, both)
    _, corrupt = passed(hf, both.corrupted, lambda key, value: value)
    logits, clean = passed(hf, both.clean, lambda key, value: value.detach().requires_grad_() if key == "embed" else value)
    keys = list(places(hf))
    gradients = torch.autograd.grad(difference(logits, both.answers).sum(), [clean[key] for key in keys])
    for (kind, layer), gradient in zip(keys, gradients):
        effect = (corrupt[kind, layer] - clean[kind, layer]).detach() * gradient
        rows = table[(table["kind"] == kind) & (table["layer"] == layer)]
        units = effect.unflatten(-1, (model.n_heads, -1)).sum((1, 3)) if kind == "head" else effect.sum((1, 2))[:, None]
        np.testing.assert_allclose(rows["effect"].to_numpy().reshape(-1, len(both)), units.T, atol=1e-4)
    assert table["effect"].abs().max() > 0.01


# Precision ------------------------------------------------------------------------------------------


def chosen(scores, n: int) -> set[str]:
    return set(scores.abs().nlargest(n).index)


def clearest(scores) -> int:
    """The number of components after which |score| falls most, so that the choice is not a matter of rounding."""
    size = scores.abs().sort_values(ascending=False).to_numpy()
    return 1 + int(np.argmax((size[:-1] - size[1:])[: len(size) // 2]))


@pytest.mark.parametrize("name", ["tiny-gemma2", "tiny-llama3", "tiny-gemma"])
def test_bf16_and_fp32_select_the_same_layers(name):
    """On the bundled models: MLPs by attribution and by causal tracing, extraction heads by path patching."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = load_model(name, dtype=dtype, device="cpu", check=False)
        twins = pairs(model, bundled.load("athletes")[:48], "cloze")
        found[dtype] = {
            "attribution": component_scores(attribute(model, twins, ("mlp",)), "score"),
            "causal tracing": component_scores(trace_components(model, twins.clean, ("mlp",), samples=1)),
            "heads": component_scores(head_paths(model, twins)),
        }
    for method, scores in found["float32"].items():
        n, rounded = clearest(scores), found["bfloat16"][method]
        assert chosen(scores, n) == chosen(rounded, n), method
        assert scores.abs().corr(rounded.abs(), "spearman") > 0.9, method
