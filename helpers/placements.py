"""The same edit made in different places: measured, and attacked by relearning.

    masks = parts(model, (1, 2))                              # gate, up and down of these MLPs, pairs, and all three
    rows = compare(model, split, masks, settings, seeds=(0, 1, 2), facts="athletes first-64")
    made, rows = completed(model, split, masks, settings, stored, again=("down",), facts="athletes first-64")   # others: stored

Every place may have a learning rate of its own, found by as many trials as those of the others (`helpers.tuned`): the best rate
depends on where the weights lie, so that one for all would favour the place that it was found for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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


def completed(model: Model, split: Split, masks: Mapping[str, Mask], settings: Mapping[str, Settings], stored: pd.DataFrame,
              method: str = "finetune", *, again: Collection[str], facts: str, **how) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Long results of every mask, those of stored edits among them: only masks without any are edited here, and those in `again`.

    Returns rows made here, by `compare` (arguments as there), and all rows. `stored` are long results with a column `model`, of which
    those of this model, these facts and `method` count; a mask of the same name in other layers is another mask. A seed made here
    replaces the stored one.
    """
    layers = {name: Choices(dict(masks), None, (), {}).layers(name) for name in masks}
    mine = stored[(stored["model"] == model.name) & (stored["facts"] == facts) & (stored["method"] == method)]
    mine = mine[mine["localization"].map(layers) == mine["layers"]]
    due = {name: mask for name, mask in masks.items() if name in again or name not in set(mine["localization"])}
    made = compare(model, split, due, settings, facts=facts, **how).assign(model=model.name)
    made["method"] = made["method"].where(made["localization"] == "none", method)
    value = ["localization", "seed", "attack", "fact", "measure"]
    return made, pd.concat([mine, made]).drop_duplicates(value, keep="last", ignore_index=True)
