"""A small world for editing tests: made-up facts, a tiny random model of any family, masks and texts for them."""

from __future__ import annotations

import dataclasses

import families
import torch

from helpers.facts import Fact, Facts, Relation
from helpers.masks import Mask, mask
from helpers.models import Model
from helpers.splits import Split, split

ANSWERS = ("w40", "w41", "w42")
RELATION = Relation("plays", "{subject} w10 w11", question="w17 {subject} w18", examples=(("w5 w6", "w43"),), options=(*ANSWERS, "w43"))
TEXTS = [" ".join(f"w{3 + (7 * i + j * (i % 5 + 1)) % 60}" for j in range(4 + i % 6)) for i in range(24)]


def facts(n: int = 24) -> Facts:
    """Subjects of one to three words, three answers, edit answers one further on."""
    items = []
    for i in range(n):
        words = [*(20 + (i * 3 + j * 5) % 20 for j in range(1 + i % 3)), 54 + i % 9, *([3 + i // 9] if i >= 9 else [])]
        name = " ".join(f"w{word}" for word in words)
        true, edit, last = (ANSWERS[(i + k) % 3] for k in range(3))
        items.append(Fact(name, RELATION, true, edit, (edit, last, "w43")))
    return Facts(tuple(items))


def model(family: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Model:
    return Model.of(families.build(family, **changes).to(dtype), families.tokenizer(), family)


def a_split(n: int = 24, forget: int = 6) -> Split:
    return split(facts(n), f"first-{forget}")


def single_weights(model: Model, units: list[str], share: float = 0.3, seed: int = 0) -> Mask:
    """A mask of single weights: a random share of those that the units own."""
    whole = mask(model, units)
    named, generator = dict(model.hf.named_parameters()), torch.Generator().manual_seed(seed)
    entries = {name: torch.rand(named[name].shape, generator=generator) < share for name in whole.entries}
    return dataclasses.replace(whole, name="single weights", entries=entries)


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.hf.named_parameters()}


def same(model: Model, before: dict[str, torch.Tensor]) -> bool:
    """Every weight bit for bit as it was."""
    bits = lambda tensor: tensor.detach().view(-1).view(torch.uint8)
    return all(torch.equal(bits(p), bits(before[name])) for name, p in model.hf.named_parameters())


def logits(model: Model) -> torch.Tensor:
    p = families.prompts()
    with torch.no_grad():
        out = model.hf(input_ids=p.tokens, attention_mask=p.mask, position_ids=p.position_ids, use_cache=False).logits
    return out[torch.arange(len(p.last)), p.last]
