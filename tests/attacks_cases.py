"""A tiny model that knows its facts after seconds of training, an edit of it, and what the attack tests share.

Random weights of a supported family, the bundled athletes, a tokenizer that knows their names. Everything is built
once a process; attacks must not change it, and `test_attacks_registry` holds them to it.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import families
import small
import torch

from helpers import facts as bundled
from helpers.facts import Facts
from helpers.masks import mask
from helpers.models import Model
from helpers.pretrain import corpus
from helpers.selection import everything
from helpers.splits import Split, split
from helpers.unlearning.edit import Edit
from helpers.unlearning.finetune import finetune
from helpers.unlearning.texts import general_texts
from helpers.unlearning.training import Settings
from helpers.vocabulary import build_tokenizer

N_FACTS, N_FORGET = 80, 16
QUICK = Settings(learning_rate=5e-3, steps=6, batch=16, text_tokens=16)
ONE_SHOT = {"formats": ("one_shot",)}


@functools.cache
def tokenizer():
    return build_tokenizer([f.subject for f in bundled.load()[:N_FACTS]], corpus().templates(), 50)


@functools.cache
def texts() -> list[str]:
    return general_texts(30)


@functools.cache
def a_split() -> Split:
    return split(bundled.load()[:N_FACTS], f"first-{N_FORGET}")


def random_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Model:
    hf = families.build(family, vocab_size=len(tokenizer()), max_position_embeddings=256)
    return Model.of(hf.to(dtype), tokenizer(), family)


@functools.cache
def known() -> Model:
    """A model trained to know all the athletes, on the one-shot format alone."""
    model, given = random_model(), a_split()
    settings = Settings(learning_rate=1e-2, steps=60, batch=64, text_tokens=16)
    every = Facts((*given.forget, *given.retain_test))
    given = replace(given, retain_test=every[:0])
    learned = finetune(model, given, everything(model), "relearn", settings, texts(), forget=every)
    for name, value in learned.values.items():
        model.hf.get_parameter(name).data.copy_(value)
    return model


@functools.cache
def edit(units: tuple[str, ...] = ("mlp 1", "mlp 2")) -> Edit:
    """An edit of the forget set of `known`."""
    settings = Settings(learning_rate=2e-2, steps=30, batch=32, text_tokens=16)
    return finetune(known(), a_split(), mask(known(), list(units)), "edit", settings, texts())


def random_edit(model: Model, units: tuple[str, ...] = ("mlp 1",), share: float | None = None) -> Edit:
    """New random values of some units, or of a share of their weights."""
    chosen = mask(model, list(units)) if share is None else small.single_weights(model, list(units), share)
    generator = torch.Generator().manual_seed(3)
    old = {name: model.hf.get_parameter(name).detach() for name in chosen.entries}
    new = {name: w + 0.1 * torch.randn(w.shape, generator=generator).to(w) for name, w in old.items()}
    return Edit.of(model, chosen, new, {"method": "random"})


def mean(rows, column: str = "top_true", **where) -> float:
    """Mean of a column over the rows with these values."""
    for name, value in where.items():
        rows = rows[rows[name] == value]
    assert len(rows), f"no rows with {where}"
    return float(rows[column].mean())
