"""The bundled models' corpus and tokenizer, for tests."""

import pytest

from helpers import pretrain
from helpers.pretrain import Recipe

TINY = Recipe("llama3", n_kv_heads=1, n_layers=2, d_model=32, n_heads=2, d_mlp=48, n_merges=100, steps=12,
              batch_tokens=480, warmup=4, seed=3)


@pytest.fixture(scope="module")
def source():
    return pretrain.corpus()
