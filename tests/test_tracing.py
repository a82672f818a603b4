"""Reading and interventions against plain transformers and plain hooks, in every supported family."""

import copy
from contextlib import ExitStack

import families
import pytest
import torch
from tracing_cases import EDITABLE, at, forward, hook, pair, prompts

from helpers.models import Component, Model
from helpers.tracing import Intervention, intervene, read


def hooked(hf, prompts, hooks, **changes):
    """Logits of `hf` with (site, layer, change) hooks in place."""
    with ExitStack() as stack:
        for site, layer, change in hooks:
            stack.callback(hook(hf, site, layer, change).remove)
        return forward(hf, prompts, **changes)


def capture(hf, prompts, site, layer):
    """The activation at a site, by an ordinary hook."""
    seen = []
    hooked(hf, prompts, [(site, layer, lambda value: seen.append(value.clone()) or value)])
    return seen[0]


def spread(where, value):
    """Booleans (n, length) with as many trailing dimensions as the activation."""
    return where.view(*where.shape, *[1] * (value.ndim - 2))


# Reading ------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(pair, prompts):
    model, hf = pair
    torch.testing.assert_close(read(model, prompts).logits, forward(hf, prompts), atol=1e-5, rtol=1e-5)


def test_padding_side_and_batch_size_do_not_matter(pair):
    model, _ = pair
    left = read(model, families.prompts("left"), batch_size=2).logits
    right = read(model, families.prompts("right")).logits
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("site", EDITABLE)
def test_sites_hold_what_hooks_see(pair, prompts, site):
    model, hf = pair
    trace = read(model, prompts, [(site, layer) for layer in range(3)])
    for layer in range(3):
        torch.testing.assert_close(trace[site, layer], capture(hf, prompts, site, layer))


def test_attention_patterns_are_those_of_transformers(pair, prompts):
    model, hf = pair
    trace = read(model, prompts, [("attn_pattern", layer) for layer in range(3)], batch_size=2)
    inputs = dict(input_ids=prompts.tokens, attention_mask=prompts.mask, position_ids=prompts.position_ids)
    for layer, pattern in enumerate(hf(**inputs, output_attentions=True).attentions):
        torch.testing.assert_close(trace["attn_pattern", layer], pattern)


def test_embedding_is_what_the_first_block_receives(pair, prompts):
    model, hf = pair
    scale = 32**0.5 if model.name.startswith("gemma") else 1.0
    expected = hf.get_input_embeddings().weight[prompts.tokens] * scale
    torch.testing.assert_close(read(model, prompts, [("embed", 0)])["embed", 0], expected)


@pytest.mark.parametrize("positions", ["last", "subject_first", "subject_last"])
def test_named_positions(pair, prompts, positions):
    model, _ = pair
    sites = [("resid_post", 1), ("head", 1), ("attn_pattern", 1)]
    every, some = read(model, prompts, sites), read(model, prompts, sites, positions)
    where = at(prompts, positions)
    column = where.int().argmax(1)
    assert torch.equal(some["resid_post", 1], every["resid_post", 1][where])
    assert torch.equal(some["head", 1], every["head", 1][where])
    assert torch.equal(some["attn_pattern", 1], every["attn_pattern", 1][torch.arange(5), :, column])
    assert torch.equal(read(model, prompts, sites, column)["head", 1], some["head", 1])


def test_contributions_sum_to_the_final_residual(pair, prompts):
    model, _ = pair
    parts = [("embed", 0)] + [(site, layer) for layer in range(3) for site in ("attn_out", "mlp_out")]
    trace = read(model, prompts, parts + [("resid_post", 2)])
    torch.testing.assert_close(sum(trace[part] for part in parts), trace["resid_post", 2], atol=1e-5, rtol=1e-5)


# Interventions ------------------------------------------------------------------------------------


def test_clean_into_clean_changes_nothing(pair, prompts):
    model, _ = pair
    sites = [("embed", 0)] + [(site, layer) for layer in range(3) for site in EDITABLE]
    clean = read(model, prompts, sites)
    everywhere = torch.ones_like(prompts.tokens, dtype=torch.bool)
    trace = intervene(model, prompts, [Intervention(*site, everywhere, clean[site]) for site in sites])
    assert torch.equal(trace.logits, clean.logits)
    assert trace.changed == (0.0,) * len(sites)


@pytest.mark.parametrize("positions", ["last", "subject", "subject_last", "all"])
@pytest.mark.parametrize("op", ["replace", "add", "zero"])
@pytest.mark.parametrize("site", EDITABLE)
def test_interventions_equal_hooks(pair, site, op, positions):
    model, hf = pair
    prompts = families.prompts("left")
    activation = capture(hf, prompts, site, 1)
    value = torch.randn(activation.shape, generator=torch.Generator().manual_seed(7))
    where = spread(at(prompts, positions), activation)
    new = {"replace": lambda old: value, "add": lambda old: old + value, "zero": torch.zeros_like}[op]
    expected = hooked(hf, prompts, [(site, 1, lambda old: torch.where(where, new(old), old))])

    edit = Intervention(site, 1, positions, None if op == "zero" else value, op)
    trace = intervene(model, prompts, [edit], read=[(site, 1)], batch_size=2)
    torch.testing.assert_close(trace.logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(trace[site, 1], torch.where(where, new(activation), activation), atol=1e-5, rtol=1e-5)
    largest = (torch.where(where, new(activation), activation) - activation).abs().max()
    assert trace.changed[0] == pytest.approx(largest.item(), rel=1e-4)


def test_value_may_be_one_vector_or_one_a_row(pair, prompts):
    model, hf = pair
    generator = torch.Generator().manual_seed(3)
    where = at(prompts, "subject")[..., None]
    for value in (torch.randn(32, generator=generator), torch.randn(5, 32, generator=generator)):
        full = value.expand(5, 32)[:, None]
        expected = hooked(hf, prompts, [("mlp_out", 0, lambda old: torch.where(where, full, old))])
        trace = intervene(model, prompts, [Intervention("mlp_out", 0, "subject", value)], batch_size=3)
        torch.testing.assert_close(trace.logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("units, site", [("heads", "head"), ("neurons", "neuron")])
@pytest.mark.parametrize("op", ["replace", "zero", "mean", "resample"])
def test_single_heads_and_neurons(pair, prompts, units, site, op):
    model, hf = pair
    chosen = [3, 1]
    activation = capture(hf, prompts, site, 1)
    order = torch.tensor([2, 0, 4, 1, 3])
    value = {
        "replace": torch.randn(activation[:, :, chosen].shape, generator=torch.Generator().manual_seed(5)),
        "resample": order,
    }.get(op)
    last = activation[torch.arange(5), prompts.last]
    target = {
        "replace": lambda: value,
        "zero": lambda: torch.zeros_like(activation[:, :, chosen]),
        "mean": lambda: activation[prompts.mask.bool()].mean(0)[chosen].expand_as(activation[:, :, chosen]),
        "resample": lambda: last[order][:, None, chosen].expand_as(activation[:, :, chosen]),
    }[op]()
    where = spread(at(prompts, "last"), activation)

    def change(old):
        new = old.clone()
        new[:, :, chosen] = target
        return torch.where(where, new, old)

    edit = Intervention(site, 1, "last", value, op, **{units: chosen})
    trace = intervene(model, prompts, [edit], batch_size=2)
    torch.testing.assert_close(trace.logits, hooked(hf, prompts, [(site, 1, change)]), atol=1e-4, rtol=1e-4)
    assert trace.changed[0] > 0


def test_resample_takes_unedited_activations_position_by_position(pair):
    """All rows of one length: then every position has a partner, also with an earlier edit in the pass."""
    model, hf = pair
    prompts = families.prompts(lengths=(7, 7, 7))
    order = torch.tensor([1, 2, 0])
    other = capture(hf, prompts, "resid_post", 1)[order]
    edits = [Intervention("mlp_out", 0, "all", op="zero"), Intervention("resid_post", 1, "all", order, "resample")]
    trace = intervene(model, prompts, edits, batch_size=2)
    torch.testing.assert_close(trace.logits, forward(hf, prompts)[order], atol=1e-4, rtol=1e-4)
    hooks = [("mlp_out", 0, torch.zeros_like), ("resid_post", 1, lambda old: other)]
    torch.testing.assert_close(trace.logits, hooked(hf, prompts, hooks), atol=1e-4, rtol=1e-4)


def test_given_mean_is_used_as_it_is(pair, prompts):
    model, _ = pair
    mean = torch.full((32,), 0.5)
    by_mean = intervene(model, prompts, [Intervention("attn_out", 2, "all", mean, "mean")])
    by_value = intervene(model, prompts, [Intervention("attn_out", 2, "all", mean)])
    assert torch.equal(by_mean.logits, by_value.logits)


def test_several_interventions_in_one_pass(pair, prompts):
    """Edits at different layers and at the same place; a later layer sees the earlier edit."""
    model, hf = pair
    last, subject = at(prompts, "last")[..., None], at(prompts, "subject")[..., None]
    hooks = [
        ("attn_out", 0, lambda old: torch.where(subject, torch.zeros_like(old), old)),
        ("resid_post", 1, lambda old: torch.where(last, old + 1, old)),
        ("resid_post", 1, lambda old: torch.where(last, old * 0 + 2, old)),
        ("mlp_out", 2, lambda old: torch.where(last, old - 1, old)),
    ]
    edits = [
        Intervention("mlp_out", 2, "last", -torch.ones(32), "add"),
        Intervention("resid_post", 1, "last", torch.ones(32), "add"),
        Intervention("resid_post", 1, "last", torch.full((32,), 2.0)),
        Intervention("attn_out", 0, "subject", op="zero"),
    ]
    trace = intervene(model, prompts, edits, read=[("resid_post", 1)], positions="last")
    torch.testing.assert_close(trace.logits, hooked(hf, prompts, hooks), atol=1e-4, rtol=1e-4)
    assert torch.equal(trace["resid_post", 1], torch.full((5, 32), 2.0))


def test_edit_of_some_rows_leaves_the_others_alone(pair, prompts):
    model, _ = pair
    where = at(prompts, "last")
    where[[0, 2]] = False
    clean = read(model, prompts)
    trace = intervene(model, prompts, [Intervention("resid_post", 1, where, op="zero")])
    same = (trace.logits == clean.logits).all(1)
    assert same.tolist() == [True, False, True, False, False]


def test_all_heads_together_are_the_attention(pair, prompts):
    """Without a post-norm and up to the output bias, z·W_O is what attention adds."""
    model, hf = pair
    if model.name == "gemma2":
        pytest.skip("a post-norm stands between the heads and the residual")
    other = read(model, families.prompts("left", seed=9), [("head", 1), ("attn_out", 1)])
    by_heads = intervene(model, prompts, [Intervention("head", 1, "all", other["head", 1])])
    by_output = intervene(model, prompts, [Intervention("attn_out", 1, "all", other["attn_out", 1])])
    torch.testing.assert_close(by_heads.logits, by_output.logits, atol=1e-4, rtol=1e-4)


def test_silencing_a_head_is_zeroing_its_columns_of_the_output_matrix(pair, prompts):
    model, hf = pair
    without = Model.of(copy.deepcopy(hf), families.tokenizer())
    name = f"{model.path('o', 1)}.weight"
    without.hf.get_parameter(name)[model.parameters(Component("head", 1, 2))[name]] = 0
    every = torch.ones_like(prompts.tokens, dtype=torch.bool)
    silenced = intervene(model, prompts, [Intervention("head", 1, every, op="zero", heads=[2])])
    torch.testing.assert_close(silenced.logits, read(without, prompts).logits, atol=1e-5, rtol=1e-5)
