"""Logit lens and direct logit attribution against plain formulas on hidden states that transformers returns."""

import copy

import families
import localization_cases as cases
import numpy as np
import pytest
import torch
from torch import nn

from helpers import tracing
from helpers.localization.lens import FrozenNorm, direct_attribution, logit_lens
from helpers.localization.positions import locate
from helpers.models import Component, Model
from helpers.sites import TracingError

N = 6
SUMMANDS = ("embed", "attn", "mlp", "bias")


@pytest.fixture(scope="module", params=families.FAMILIES)
def model(request):
    return cases.model(request.param)


@pytest.fixture(scope="module")
def prompts():
    return cases.prompts(N)


def logits_of(model, prompts):
    return tracing.read(model, prompts).logits


def test_the_lens_reads_what_the_model_would_predict(model, prompts):
    hf = copy.deepcopy(model.hf)
    table = logit_lens(model, prompts, ("last", "subject last"), batch_size=4)
    inputs = dict(input_ids=prompts.tokens, attention_mask=prompts.mask, position_ids=prompts.position_ids)
    hidden = hf(**inputs, output_hidden_states=True).hidden_states
    norm, cap = hf.get_submodule(model.final_norm_path), model.final_softcap
    for position, rows in table.groupby("position", sort=False):
        column = locate(prompts)[position].int().argmax(1)
        for layer in range(4):
            state = hidden[layer][torch.arange(N), column]
            # the last hidden state of transformers has been through the final norm
            logits = hf.get_output_embeddings()(state if layer == 3 else norm(state))
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            part = rows[rows["layer"] == layer]
            for name, ids in (("true", prompts.answer_ids), ("edit", prompts.edit_ids)):
                chosen = logits.gather(1, ids[:, None])
                np.testing.assert_allclose(part[f"logit_{name}"], chosen[:, 0], atol=1e-5)
                np.testing.assert_allclose(part[f"p_{name}"], logits.softmax(-1).gather(1, ids[:, None])[:, 0], atol=1e-6)
                assert part[f"rank_{name}"].tolist() == (logits > chosen).sum(1).tolist()
    last = table[(table["position"] == "last") & (table["layer"] == 3)]
    np.testing.assert_allclose(last["logit_true"], logits_of(model, prompts).gather(1, prompts.answer_ids[:, None])[:, 0], atol=1e-5)
    np.testing.assert_allclose(last["ld"], last["logit_true"] - last["logit_edit"], atol=1e-6)


def test_contributions_sum_to_the_logit_difference(model, prompts):
    table = direct_attribution(model, prompts, batch_size=4)
    logits = logits_of(model, prompts)
    ld = (logits.gather(1, prompts.answer_ids[:, None]) - logits.gather(1, prompts.edit_ids[:, None]))[:, 0].numpy()
    facts = table.groupby(["subject", "relation"], sort=False)
    np.testing.assert_allclose(facts["ld"].first(), ld, atol=1e-5)
    summed = table[table["kind"].isin(SUMMANDS)].groupby(["subject", "relation"], sort=False)["score"].sum()
    np.testing.assert_allclose(summed, ld, atol=1e-5)
    attention = table[table["kind"] == "attn"].set_index(["layer", "subject"])["score"]
    parts = table[table["kind"].isin(("head", "attn bias"))].groupby(["layer", "subject"])["score"].sum()
    np.testing.assert_allclose(parts.loc[attention.index], attention, atol=1e-5)
    heads = table[table["kind"] == "head"]
    assert [str(Component("head", l, h)) for l, h in zip(heads["layer"], heads["head"])] == heads["component"].tolist()
    assert len(heads) == 12 * N and ("attn bias 0" in set(table["component"])) == (model.name == "neox")


def test_contributions_follow_their_formula(model, prompts):
    """Norms frozen element by element (y/x), not by `FrozenNorm`; LayerNorm by its definition."""
    if model.name == "neox":
        pytest.skip("a LayerNorm is no product with a vector; it has a test of its own")
    alternatives = torch.tensor([9, 10, 11, 12, 13, 14])
    table = direct_attribution(model, prompts, alternatives).set_index(["component", "subject"])["score"]
    sites = [(site, layer) for layer in range(3) for site in ("head", "attn_out", "mlp_out", "resid_post")] + [("embed", 0)]
    at = {site: value.double() for site, value in tracing.read(model, prompts, sites, "last").activations.items()}
    final = at["resid_post", 2].float()
    weight = model.unembed.weight.double()
    towards = weight[prompts.answer_ids] - weight[alternatives]
    direction = (model.final_norm(final) / final).double() * towards
    if model.final_softcap is not None:
        logits = logits_of(model, prompts).double()
        capped = logits.gather(1, torch.stack([prompts.answer_ids, alternatives], 1))
        direction = direction * ((capped[:, 0] - capped[:, 1]) / (at["resid_post", 2] * direction).sum(1))[:, None]
    for layer in range(3):
        matrix = model.matrix("o", layer)[0].double()
        raw = at["head", layer].flatten(1) @ matrix.T
        scale = at["attn_out", layer] / raw  # the post-norm's, else 1
        for head in range(4):
            written = at["head", layer][:, head] @ matrix[:, head * model.d_head : (head + 1) * model.d_head].T * scale
            np.testing.assert_allclose(table[str(Component("head", layer, head))], (written * direction).sum(1), atol=1e-4)
        np.testing.assert_allclose(table[f"mlp {layer}"], (at["mlp_out", layer] * direction).sum(1), atol=1e-4)
    np.testing.assert_allclose(table["embed"], (at["embed", 0] * direction).sum(1), atol=1e-4)
    assert (table["bias"] == 0).all()


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.LayerNorm(16, bias=False), nn.RMSNorm(16, eps=1e-6)])
def test_a_frozen_norm_is_linear_and_exact_where_it_was_frozen(norm):
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=0.5, generator=generator)
    x, direction = (torch.randn(5, 16, generator=generator) for _ in range(2))
    with torch.no_grad():
        y = norm(x)
        frozen = FrozenNorm(norm, x, y)
        pulled = frozen.pull(direction)
    torch.testing.assert_close((pulled * x).sum(-1), ((y - frozen.bias) * direction).sum(-1))
    other = torch.randn(5, 16, generator=generator)
    centred = other - other.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else other
    deviation = x.var(-1, unbiased=False) if isinstance(norm, nn.LayerNorm) else x.square().mean(-1)
    expected = (centred / deviation.sqrt()[:, None] * norm.weight.detach() * direction).sum(-1)
    torch.testing.assert_close((pulled * other).sum(-1), expected, atol=1e-4, rtol=1e-4)


def test_a_part_without_influence_contributes_nothing(prompts):
    """An attention whose output matrix is zero; an embedding of zeros cannot be had, so the MLP likewise."""
    model = cases.model("llama")
    with torch.no_grad():
        model.matrix("o", 1)[0].zero_()
        model.matrix("down", 2)[0].zero_()
    table = direct_attribution(model, prompts)
    silent = table["component"].isin(["attn 1", "mlp 2", *(f"head 1.{head}" for head in range(4))])
    assert (table[silent]["score"] == 0).all() and (table[~silent & (table["kind"] != "bias")]["score"] != 0).all()


def test_bfloat16(prompts):
    model = Model.of(copy.deepcopy(families.build("gemma2")).bfloat16(), families.tokenizer())
    table = direct_attribution(model, prompts)
    summed = table[table["kind"].isin(SUMMANDS)].groupby(["subject", "relation"], sort=False)["score"].sum()
    np.testing.assert_allclose(summed, table.groupby(["subject", "relation"], sort=False)["ld"].first(), atol=0.05)
    assert len(logit_lens(model, prompts)) == 4 * 2 * N


def test_errors(prompts):
    model = cases.model("llama")
    with pytest.raises(ValueError, match=r"\['later', 'subject'\] are several tokens in some prompts"):
        logit_lens(model, cases.prompts(N), ("subject", "later"), after=1)
    with pytest.raises(TracingError, match="Tanh is neither an RMS norm nor a LayerNorm"):
        x = torch.randn(3, 8)
        FrozenNorm(nn.Tanh(), x, torch.tanh(x))
