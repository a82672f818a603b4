"""The same edit made in different places: measured, and attacked by relearning.

    masks = parts(model, (1, 2))                              # gate, up and down of these MLPs, pairs, and all three
    rows = compare(model, split, masks, settings, seeds=(0, 1, 2), facts="athletes first-64")

Every place may have a learning rate of its own, found by as many trials as those of the others (`helpers.tuned`): the best rate
depends on where the weights lie, so that one for all would favour the place that it was found for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import pandas as pd

from helpers import attacks, results
from helpers.attacks.relearning import PUBLISHED
from helpers.localization.choices import Choices
from helpers.masks import MLP, Mask, mask
from helpers.models import Model
from helpers.splits import Split
from helpers.unlearning import evaluation
from helpers.unlearning.finetune import finetune
from helpers.unlearning.training import Settings


def parts(model: Model, layers: Sequence[int]) -> dict[str, Mask]:
    """Every combination of the matrices of these MLPs: `gate`, …, `gate + up`, …, `gate + up + down`, smaller ones first.

    A model without a gate has up and down only. Raises `SelectionError` for no layers, or one that is not there.
    """
    kinds = [kind for kind in MLP if kind != "gate" or "gate" in model.roles]
    groups = {" + ".join(group): group for n in range(1, len(kinds) + 1) for group in combinations(kinds, n)}
    return {name: mask(model, [f"{kind} {layer}" for layer in layers for kind in group], name) for name, group in groups.items()}


def compare(model: Model, split: Split, masks: Mapping[str, Mask], settings: Mapping[str, Settings], seeds: Sequence[int] = (0, 1, 2), *,
            facts: str, rate: float = 2e-3, steps: int = 20, relearning: Settings = PUBLISHED, texts: Sequence[str] | None = None,
            reading: Mapping = {}) -> pd.DataFrame:
    """Long results (`helpers.results`) of one edit a mask and seed by `finetune` with the mask's settings, and of the unedited model
    (localization `none`).

    Each edit is measured (`reading` goes to `evaluation.evaluate`) and attacked by LoRA on half of the
    facts at `rate` for `steps` steps, otherwise as `relearning` says. With the defaults that is the attack which claims call
    "relearn lora". `texts` serve training and relearning. The model stays as it is.
    """
    names, where = Choices(dict(masks), None, (), {}), {"facts": facts, "n": len(split.forget)}
    measured = lambda: evaluation.evaluate(model, split, **reading)
    tables = [results.of_evaluation(measured(), localization="none", method="base", seed=seeds[0], **where)]
    for name, places in masks.items():
        place = {"localization": name, "layers": names.layers(name), "method": "finetune", **where}
        for seed in seeds:
            edit = finetune(model, split, places, "edit", settings[name], texts, seed)
            with edit.applied(model):
                tables.append(results.of_evaluation(measured(), seed=seed, **place))
            relearned = attacks.relearn(model, edit, split, rates=(rate,), steps=(steps,), settings=relearning, texts=texts,
                                        formats=("one_shot",), n_retain=40, seed=seed)
            tables.append(results.of_attacks(relearned, split, seed=seed, **place))
    return pd.concat(tables, ignore_index=True)
