"""Short trainings, and how far two of them are apart, for tests of fine-tuning."""

import math

import small
import torch

from helpers.masks import mask
from helpers.unlearning.edit import Edit
from helpers.unlearning.finetune import finetune
from helpers.unlearning.training import Settings

QUICK = Settings(steps=6, batch=8, learning_rate=3e-3, text_tokens=8)


def run(model, chosen=None, objective="edit", settings=QUICK, **options) -> Edit:
    return finetune(model, small.a_split(), chosen or mask(model, ["mlp 1", "attn 2"]), objective, settings, small.TEXTS, **options)


def equal(one: Edit, other: Edit) -> bool:
    return one.values.keys() == other.values.keys() and all(torch.equal(one.values[name], other.values[name]) for name in one.values)


def difference(one: dict, other: dict, base: dict) -> float:
    """Norm of the difference of two sets of weights, relative to the norm of the change."""
    gap = sum((one[name] - other[name]).square().sum() for name in one)
    return math.sqrt(gap / sum((one[name] - base[name]).square().sum() for name in one))


def new_weights(edit: Edit, model) -> dict[str, torch.Tensor]:
    with edit.applied(model):
        return {name: model.hf.get_parameter(name).detach().clone() for name in edit.values}
