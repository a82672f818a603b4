"""Parts of a pass put together again: the numbers of a whole one, in every family."""

import families
import pytest
import small
import torch

from helpers.unlearning.forward import hidden_states, layer_of, logits_of
from helpers.unlearning.terms import Sequences

FAMILIES = ("llama", "gemma", "gemma2", "qwen3", "neox")


def whole(model, p) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(input_ids=p.tokens, attention_mask=p.mask, position_ids=p.position_ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_two_parts_make_a_whole_bit_for_bit(family):
    model, p = small.model(family), families.prompts()
    real, wanted = p.mask.bool(), whole(model, p)
    with torch.no_grad():
        for layer in range(model.n_layers + 1):
            below = hidden_states(model, p.tokens, p.mask, stop=layer)
            above = hidden_states(model, p.tokens, p.mask, start=layer, residual=below)
            assert torch.equal(logits_of(model, above)[real], wanted[real])
    assert torch.equal(whole(model, p), wanted)  # nothing stayed replaced


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [1, 4])
def test_a_common_start_is_run_once(family, shared):
    """Also where it is longer than a sliding window (Gemma2's is 4 here), and from a residual on."""
    model, p = small.model(family), families.prompts()
    p.tokens[:, :4] = p.tokens[0, :4]
    real, wanted, lengths = p.mask[:, shared:].bool(), whole(model, p)[:, shared:], []
    model.mlp(2).register_forward_hook(lambda _, args, out: lengths.append(tuple(out.shape[:2])))
    with torch.no_grad():
        for layer in range(model.n_layers):
            below = hidden_states(model, p.tokens, p.mask, stop=layer)
            above = hidden_states(model, p.tokens, p.mask, layer, below, shared=shared)
            assert torch.allclose(logits_of(model, above)[real], wanted[real], atol=1e-5)
    assert set(lengths) == {(1, shared), (5, 9 - shared)}


def test_common_start_leaves_a_token():
    tokens, mask = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert Sequences(tokens, mask).common_start == 2
    assert Sequences(torch.tensor([[5, 6], [4, 6]]), torch.ones(2, 2, dtype=torch.long)).common_start == 0


def test_layers_of_parameters():
    model = small.model("gemma2")
    assert layer_of(model, "model.layers.2.mlp.up_proj.weight") == 2
    assert layer_of(model, "model.embed_tokens.weight") == -1  # tied: everything depends on it
    assert layer_of(model, "model.norm.weight") == 3


def test_left_out_blocks_come_back_after_an_error():
    model, p = small.model(), families.prompts()
    before = [vars(module).get("forward") for module in model.hf.modules()]
    with pytest.raises(RuntimeError):
        hidden_states(model, p.tokens, p.mask, 1, torch.zeros(5, 9, 7))
    assert [vars(module).get("forward") for module in model.hf.modules()] == before
