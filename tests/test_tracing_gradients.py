"""Knock-out of attention and gradients, against masks given to transformers and finite differences, in every supported family."""

import copy
from functools import partial

import families
import pytest
import torch
from tracing_cases import EDITABLE, at, forward, pair, prompts

from helpers.models import Model
from helpers.tracing import Intervention, KnockOut, TracingError, gradients, intervene, knock_out_attention, read

# Knock-out ----------------------------------------------------------------------------------------


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


# Gradients ----------------------------------------------------------------------------------------


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
