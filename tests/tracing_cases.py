"""A model of every family with an untouched copy, and the reference: ordinary forward hooks that never go through nnsight."""

import copy

import families
import pytest
import torch

from helpers.models import Model

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
