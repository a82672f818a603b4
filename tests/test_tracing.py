"""Tracing against plain transformers, plain hooks and TransformerLens, in every supported family.

The reference never goes through nnsight: it is a copy of the model made before the first trace, with
ordinary forward hooks.
"""

import copy
from contextlib import ExitStack
from functools import partial

import families
import pytest
import torch
from transformers import AutoTokenizer

from helpers import tracing
from helpers.models import Component, Model
from helpers.tracing import Intervention, KnockOut, TracingError, gradients, intervene, knock_out_attention, read

EDITABLE = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head", "neuron")
POST_NORM = {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}


@pytest.fixture(scope="module", params=families.FAMILIES)
def pair(request):
    """(model to trace, untouched copy of its transformers model)."""
    hf = families.build(request.param)
    return Model.of(copy.deepcopy(hf), families.tokenizer(), request.param), hf


@pytest.fixture(params=["left", "right"])
def prompts(request):
    return families.prompts(request.param)


def forward(hf, prompts, **changes):
    """Logits at the last real token, by transformers alone."""
    inputs = dict(input_ids=prompts.tokens, attention_mask=prompts.mask, position_ids=prompts.position_ids)
    logits = hf(**inputs | changes, use_cache=False).logits
    return logits[torch.arange(len(prompts.tokens)), prompts.last]


def at(prompts, positions):
    """Named positions as booleans (n, length), spelled out row by row."""
    where = torch.zeros(prompts.tokens.shape, dtype=torch.bool)
    for row, (start, stop) in enumerate(prompts.subject.tolist()):
        last = int(prompts.last[row])
        columns = {"last": last, "subject": slice(start, stop), "subject_first": start, "subject_last": stop - 1}
        where[row, columns[positions] if positions != "all" else prompts.mask[row].bool()] = True
    return where


def hook(hf, site, layer, change):
    """Register an ordinary hook that applies `change` to the activation at a site."""
    block = hf.base_model.layers[layer]
    attention = getattr(block, "attention", None) or block.self_attn
    heads = hf.config.num_attention_heads

    def on_input(module, inputs):
        value = inputs[0]
        if site == "head":
            return (change(value.unflatten(-1, (heads, -1))).flatten(-2), *inputs[1:])
        return (change(value), *inputs[1:])

    def on_output(module, inputs, output):
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    if site == "head":
        output_matrix = attention.dense if hasattr(attention, "dense") else attention.o_proj
        return output_matrix.register_forward_pre_hook(on_input)
    if site == "neuron":
        down = block.mlp.dense_4h_to_h if hasattr(block.mlp, "dense_4h_to_h") else block.mlp.down_proj
        return down.register_forward_pre_hook(on_input)
    if site == "resid_pre":
        return block.register_forward_pre_hook(on_input)
    module = {"resid_post": block, "attn_out": attention, "mlp_out": block.mlp}[site]
    if site in POST_NORM and hasattr(block, "post_feedforward_layernorm"):
        module = getattr(block, POST_NORM[site])
    return module.register_forward_hook(on_output)


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


# Reading --------------------------------------------------------------------------------------------


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


# Interventions --------------------------------------------------------------------------------------


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


# Knock-out ------------------------------------------------------------------------------------------


def additive_mask(prompts, cut, window=None):
    """(n, 1, length, length): 0 where a query may look, -inf where padding, future, window or cut forbid."""
    length = prompts.tokens.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    allowed = (distance >= 0) & (prompts.mask.bool()[:, None, :] | (distance == 0)) & ~cut
    if window is not None:
        allowed &= distance < window
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]


@pytest.mark.parametrize(
    "queries, keys", [("last", "subject"), ("last", "subject_last"), ("subject_last", "subject_first")]
)
def test_knock_out_equals_a_mask_given_to_transformers(pair, prompts, queries, keys):
    model, hf = pair
    cut = at(prompts, queries)[:, :, None] & at(prompts, keys)[:, None, :]
    mask = additive_mask(prompts, cut)
    if model.name == "gemma2":
        mask = {"full_attention": mask, "sliding_attention": additive_mask(prompts, cut, window=4)}
    if model.name == "qwen3":
        mask = {"full_attention": mask}
    expected = forward(hf, prompts, attention_mask=mask)
    trace = knock_out_attention(model, prompts, [0, 1, 2], queries, keys, batch_size=2)
    torch.testing.assert_close(trace.logits, expected, atol=1e-5, rtol=1e-5)
    assert (trace.logits - read(model, prompts).logits).abs().max() > 1e-3


def test_knock_out_of_single_heads_renormalises_their_pattern(pair, prompts):
    model, _ = pair
    clean = read(model, prompts, [("attn_pattern", 1)])["attn_pattern", 1]
    trace = knock_out_attention(model, prompts, [1], "last", "subject", heads=[0, 3], read=[("attn_pattern", 1)])
    cut = (at(prompts, "last")[:, :, None] & at(prompts, "subject")[:, None, :])[:, None].expand_as(clean).clone()
    cut[:, [1, 2]] = False
    expected = clean.masked_fill(cut, 0)
    real = prompts.mask.bool()[:, None, :, None]
    expected = torch.where(real, expected / expected.sum(-1, keepdim=True), clean)
    torch.testing.assert_close(trace["attn_pattern", 1], expected)
    assert trace.changed == (2 * 2 * 5,)  # heads, subject tokens, rows: layer 1 of gemma2 has no window


def test_knock_out_beyond_a_window_or_in_the_future_changes_nothing(pair, prompts):
    model, _ = pair
    trace = knock_out_attention(model, prompts, [0, 1, 2], "subject_first", "last")
    assert torch.equal(trace.logits, read(model, prompts).logits)
    assert trace.changed == (0.0, 0.0, 0.0)


def test_knock_out_and_intervention_share_a_pass(pair, prompts):
    model, _ = pair
    clean = read(model, prompts, [("attn_out", 1)])
    cut = KnockOut(1, "last", "subject")
    undone = intervene(model, prompts, [cut, Intervention("attn_out", 1, "all", clean["attn_out", 1])])
    torch.testing.assert_close(undone.logits, clean.logits, atol=1e-5, rtol=1e-5)
    assert undone.changed[1] > 0


def test_a_query_keeps_at_least_one_key(pair):
    model, _ = pair
    with pytest.raises(TracingError, match="knock-out at layer 1: position 0 of row 0 would have no key left"):
        knock_out_attention(model, families.prompts("right"), [1], "all", "all")


# Gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site, layer", [("embed", 0)] + [(site, 1) for site in EDITABLE])
def test_gradients_agree_with_finite_differences(pair, site, layer):
    model, hf = pair
    double = Model.of(copy.deepcopy(hf).double(), families.tokenizer(), model.name)
    # no padding: a padding token may have no key to attend to, and the lowest float64, which then fills
    # its row of the mask, is -inf in transformers' float32 softmax
    prompts = families.prompts(lengths=(7, 7, 7, 7, 7))
    targets = torch.tensor([5, 9, 11, 20, 33])

    def metric(logits, rows):
        return logits.log_softmax(-1).gather(1, targets[rows, None])[:, 0]

    values, found = gradients(double, prompts, [(site, layer)], metric, batch_size=2)
    activation, gradient = found[site, layer]
    direction = torch.randn(activation.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    everywhere = torch.ones_like(prompts.tokens, dtype=torch.bool)
    step = 3e-4  # norms and softmax stay in float32 inside transformers, which limits how small it can be

    def moved(sign):
        edit = Intervention(site, layer, everywhere, sign * step * direction, "add")
        return metric(intervene(double, prompts, [edit]).logits, torch.arange(5))

    numeric = (moved(1) - moved(-1)) / (2 * step)
    exact = (gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(exact, numeric, atol=3e-3, rtol=2e-3)
    torch.testing.assert_close(values, metric(read(double, prompts).logits, torch.arange(5)))


def test_gradients_of_many_sites_come_from_one_pass(pair, prompts):
    model, _ = pair
    sites = [("embed", 0), ("resid_pre", 0), ("head", 2), ("attn_out", 0), ("resid_post", 2)]
    metric = partial(lambda logits, rows: logits[:, 3])
    _, together = gradients(model, prompts, sites, metric)
    clean = read(model, prompts, sites)
    for site in sites:
        _, alone = gradients(model, prompts, [site], metric)
        torch.testing.assert_close(together[site][1], alone[site][1])
        assert torch.equal(together[site][0], clean[site])
    assert torch.equal(together["embed", 0][1], together["resid_pre", 0][1])
    assert all(parameter.grad is None for parameter in model.hf.parameters())


def test_gradients_at_moved_embeddings(pair, prompts):
    """What integrated gradients needs: the gradient where the embeddings are halved."""
    model, _ = pair
    embed = read(model, prompts, [("embed", 0)])["embed", 0]
    halved = Intervention("embed", 0, "all", embed / 2)
    values, found = gradients(model, prompts, [("embed", 0)], lambda logits, rows: logits[:, 3], [halved])
    torch.testing.assert_close(values, intervene(model, prompts, [halved]).logits[:, 3])
    real = prompts.mask.bool()
    torch.testing.assert_close(found["embed", 0][0][real], embed[real] / 2)
    assert found["embed", 0][1][real].any()


# What must not happen -------------------------------------------------------------------------------


def test_model_prompts_and_tokenizer_stay_as_they_were(pair, prompts):
    model, hf = pair
    before = copy.deepcopy(vars(prompts))
    side = model.tokenizer.padding_side
    intervene(model, prompts, [Intervention("resid_post", 0, "all", op="zero"), KnockOut(1, "last", "subject")])
    gradients(model, prompts, [("head", 0)], lambda logits, rows: logits[:, 0])
    for name, value in hf.state_dict().items():
        assert torch.equal(model.hf.state_dict()[name], value), name
    assert all(torch.equal(vars(prompts)[name], value) for name, value in before.items())
    assert model.tokenizer.padding_side == side
    assert torch.equal(forward(model.hf, prompts), forward(hf, prompts))


def test_a_copy_made_after_tracing_is_a_model_of_its_own(pair, prompts, tmp_path):
    model, _ = pair
    clean = read(model, prompts)
    twin = Model.of(copy.deepcopy(model.hf), model.tokenizer)
    twin.matrix("down", 1)[0].zero_()
    without_mlp = intervene(model, prompts, [Intervention("neuron", 1, "all", op="zero")])
    torch.testing.assert_close(read(twin, prompts).logits, without_mlp.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(read(model, prompts).logits, clean.logits)
    model.hf.save_pretrained(tmp_path)


def test_bfloat16(pair, prompts):
    _, hf = pair
    model = Model.of(copy.deepcopy(hf).bfloat16(), families.tokenizer())
    sites = [("resid_post", 1), ("head", 1), ("neuron", 1)]
    clean = read(model, prompts, sites)
    assert clean.logits.dtype == torch.float32 and clean["head", 1].dtype == torch.bfloat16
    patched = intervene(model, prompts, [Intervention(*site, "all", clean[site].float()) for site in sites])
    assert torch.equal(patched.logits, clean.logits)
    cut = knock_out_attention(model, prompts, [0, 1, 2], "last", "subject", read=[("attn_pattern", 2)])
    where = at(prompts, "last")[:, :, None] & at(prompts, "subject")[:, None, :]
    assert not cut["attn_pattern", 2].masked_select(where[:, None]).any()
    means = [Intervention("mlp_out", 1, "all", op="mean")]
    means += [Intervention("head", 0, "last", torch.arange(5), "resample")]
    assert intervene(model, prompts, means).changed[1] == 0
    assert gradients(model, prompts, [("embed", 0)], lambda logits, rows: logits[:, 3])[1]["embed", 0][1].any()


def test_a_module_that_returns_one_row_is_noticed():
    """What an unchecked `output[0]` would silently accept."""
    model = Model.of(families.build("llama"), families.tokenizer())
    block, original = model.block(1), model.block(1).forward
    block.forward = lambda *args, **kwargs: original(*args, **kwargs)[0]
    with pytest.raises(TracingError, match=r"resid_post at layer 1: found \(9, 32\) in the model, expected \(5, 9, 32"):
        read(model, families.prompts(), [("resid_post", 1)])


@pytest.mark.parametrize("damage", ["ignored", "one row only", "everywhere"])
def test_an_edit_that_does_not_take_effect_is_noticed(monkeypatch, damage):
    put = tracing._Tap.put

    def broken(self, tensor):
        if damage == "one row only":
            value = self.fetch().clone()
            value[0] = tensor[0]
            put(self, value)
        elif damage == "everywhere":
            put(self, torch.zeros_like(tensor))

    monkeypatch.setattr(tracing._Tap, "put", broken)
    model = Model.of(families.build("llama"), families.tokenizer())
    with pytest.raises(TracingError, match=r"zero head at layer 1: did not take effect .* \(5, 9, 4, 8\)"):
        intervene(model, families.prompts(), [Intervention("head", 1, "last", op="zero")])


ROW = torch.zeros(32)
ERRORS = [
    (Intervention("residual", 1, "last", ROW), "site 'residual': allowed are embed, resid_pre"),
    (Intervention("resid_pre", 3, "last", ROW), "resid_pre at layer 3: allowed layers are 0 to 2"),
    (Intervention("resid_pre", -1, "last", ROW), "resid_pre at layer -1: allowed layers are 0 to 2"),
    (Intervention("embed", 1, "last", ROW), "embed at layer 1: allowed layers are 0"),
    (Intervention("attn_pattern", 1, "last", ROW), "attn_pattern is read only; use a KnockOut"),
    (Intervention("resid_pre", 1, "first", ROW), "positions 'first': allowed are last, subject"),
    (Intervention("resid_pre", 1, torch.zeros(5, 9), ROW), r"must be boolean and \(n, length\) = \(5, 9\)"),
    (Intervention("resid_pre", 1, torch.zeros(5, 9).bool(), ROW), "selects nothing"),
    (Intervention("resid_pre", 1, "last", op="swap"), "op 'swap': allowed are replace, add"),
    (Intervention("resid_pre", 1, "last"), "replace resid_pre at layer 1: op 'replace' needs a value"),
    (
        Intervention("head", 1, "last", torch.zeros(8), heads=[1]),
        r"replace head at layer 1: value is \(8,\), allowed are \(1, 8\) or \(5, 1, 8\) or \(5, 9, 1, 8\)",
    ),
    (Intervention("head", 1, "last", op="zero", heads=[4]), r"heads or neurons \[4\]: allowed are 0 to 3"),
    (Intervention("resid_pre", 1, "last", op="zero", heads=[1]), "heads go with site 'head' only"),
    (Intervention("head", 1, "last", op="zero", neurons=[1]), "neurons go with site 'neuron' only"),
    (Intervention("resid_pre", 1, "last", op="resample"), r"one row number for each of the 5 rows"),
    (Intervention("resid_pre", 1, "last", torch.tensor([0, 1, 2, 3, 5]), "resample"), "lies outside 0 to 4"),
    (
        Intervention("resid_pre", 1, "all", torch.tensor([1, 0, 2, 3, 4]), "resample"),
        "row 0 has 9 positions and row 1, from which it should take, has 6; use a single position",
    ),
    (KnockOut(3, "last", "subject"), "at layer 3: allowed layers are 0 to 2"),
    (KnockOut(1, "last", "subject", heads=[4]), r"knock-out at layer 1: heads \[4\]: allowed are 0 to 3"),
]


@pytest.mark.parametrize("edit, message", ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors_name_layer_site_and_what_is_allowed(edit, message):
    model = Model.of(families.build("llama"), families.tokenizer())
    with pytest.raises(TracingError, match=message):
        intervene(model, families.prompts(), [edit])


def test_errors_of_reading():
    model = Model.of(families.build("llama"), families.tokenizer())
    prompts = families.prompts()
    with pytest.raises(TracingError, match="'subject' are several a row; to read them, read all"):
        read(model, prompts, [("resid_pre", 1)], positions="subject")
    with pytest.raises(TracingError, match="one index a row"):
        read(model, prompts, [("resid_pre", 1)], positions=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TracingError, match=r"\('mlp_out', 1\) was not read; there are \[\('resid_pre', 1\)\]"):
        read(model, prompts, [("resid_pre", 1)])["mlp_out", 1]
    with pytest.raises(TracingError, match=r"one value a row is \(5,\)"):
        gradients(model, prompts, [("resid_pre", 1)], lambda logits, rows: logits)
    no_subject = families.Prompts(**vars(prompts) | dict(subject=prompts.subject * 0))
    with pytest.raises(TracingError, match=r"no subject tokens in row 0 \(5 such rows\)"):
        read(model, no_subject, [("resid_pre", 1)], positions="subject_last")
    padded_last = families.Prompts(**vars(prompts) | dict(last=prompts.last * 0 + 8))
    with pytest.raises(TracingError, match="the last token of some row is padding"):
        read(model, padded_last)


# Second opinion -------------------------------------------------------------------------------------


def test_transformer_lens_agrees(tmp_path):
    """Residuals, head outputs, patterns, contributions, and the effect of silencing one head."""
    lens = pytest.importorskip("transformer_lens.model_bridge")
    hf = families.build("llama")
    families.tokenizer().save_pretrained(tmp_path)
    hf.config.save_pretrained(tmp_path)
    bridge = lens.TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=copy.deepcopy(hf), tokenizer=AutoTokenizer.from_pretrained(tmp_path)
    )
    model = Model.of(hf, families.tokenizer())
    prompts = families.prompts(lengths=(7, 7, 7))
    names = dict(resid_post="hook_resid_post", resid_pre="hook_resid_pre", head="attn.hook_z")
    names |= dict(attn_out="hook_attn_out", mlp_out="hook_mlp_out", attn_pattern="attn.hook_pattern")
    trace = read(model, prompts, [(site, layer) for site in names for layer in range(3)])
    logits, cache = bridge.run_with_cache(prompts.tokens)
    torch.testing.assert_close(trace.logits, logits[:, -1], atol=1e-5, rtol=1e-5)
    for site, name in names.items():
        for layer in range(3):
            theirs = cache[f"blocks.{layer}.{name}"].view(trace[site, layer].shape)
            torch.testing.assert_close(trace[site, layer], theirs, atol=1e-5, rtol=1e-5)

    def silence(z, hook):
        z = z.clone()
        z.view(3, 7, model.n_heads, model.d_head)[:, -1, 2] = 0
        return z

    theirs = bridge.run_with_hooks(prompts.tokens, fwd_hooks=[("blocks.1.attn.hook_z", silence)])[:, -1]
    ours = intervene(model, prompts, [Intervention("head", 1, "last", op="zero", heads=[2])])
    torch.testing.assert_close(ours.logits, theirs, atol=1e-5, rtol=1e-5)
    assert (ours.logits - trace.logits).abs().max() > 1e-3
