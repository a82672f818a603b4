"""Models whose first blocks look back one token only, and training that begins with another model's weights."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from helpers import pretrain
from helpers.pretrain import RECIPES, Recipe, new_model, train

TINY = Recipe("gemma2", n_kv_heads=1, n_layers=4, d_model=32, n_heads=2, d_mlp=48, n_merges=100, steps=2, batch_tokens=480, warmup=1, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return pretrain.tokenizer_for(TINY, pretrain.corpus())


def test_a_token_reaches_as_far_as_there_are_local_blocks(tokenizer):
    model = new_model(replace(TINY, local_blocks=3), tokenizer).eval()
    tokens = torch.randint(10, len(tokenizer), (1, 9), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 2] = tokens[0, 2] + 1
    with torch.no_grad():
        streams = [torch.stack(model(input_ids=t, output_hidden_states=True).hidden_states[1:]) for t in (tokens, other)]
    changed = (streams[0] != streams[1]).any(-1)[:, 0]
    for block in range(3):  # three local blocks: it moves on by one place in each
        assert changed[block].nonzero()[:, 0].tolist() == list(range(2, 4 + block))
    assert changed[3, 2:].all() and not changed[:, :2].any()


def test_training_begins_with_the_weights_of_another(tmp_path):
    train(TINY, tmp_path / "first", compiled=False)
    train(replace(TINY, local_blocks=2, start="first", learning_rate=0.0), tmp_path / "second", compiled=False)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_what_cannot_be_trained_is_said_before_it_begins(tmp_path):
    with pytest.raises(ValueError, match="begins with nobody, which is not there"):
        train(replace(TINY, start="nobody"), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="local_blocks=2: only gemma2 has them"):
        replace(TINY, family="llama3", local_blocks=2)
    with pytest.raises(ValueError, match="local_blocks=9"):
        replace(TINY, local_blocks=9)


def test_a_recipe_begins_with_a_model_of_the_same_sizes_and_vocabulary():
    for recipe in (recipe for recipe in RECIPES.values() if recipe.start):
        start = RECIPES[recipe.start]
        assert replace(recipe, steps=start.steps, local_blocks=start.local_blocks, start=start.start) == start
