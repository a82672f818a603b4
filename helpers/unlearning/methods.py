"""The methods that `data/claims.yaml` names and that train: from a mask to an edit.

    edit = make("finetune", model, known, split, mask, settings, seed)
    with edit.applied(model):
        rows = evaluate(model, split, forget=read_on(split))

Where all facts with one answer are to go (spec section 1.2), half of them is trained on and the other half read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from helpers.facts import Facts
from helpers.localization.choices import choose
from helpers.masks import Mask, SelectionError
from helpers.models import Model
from helpers.splits import Split
from helpers.unlearning.edit import Edit
from helpers.unlearning.finetune import finetune
from helpers.unlearning.sequential import Localize, by_finetuning, sequential
from helpers.unlearning.training import Settings

OBJECTIVES = {"finetune": "edit", "unlearn": "unlearn", "sequential": "edit"}


def make(method: str, model: Model, known: Facts, split: Split, mask: Mask, settings: Settings = Settings(), seed: int = 0,
         texts: Sequence[str] | None = None, slices: int = 4) -> Edit:
    """The edit of `trained_on(split)`; the model stays as it is.

    `finetune` and `unlearn` train the mask. `sequential` edits one of `slices` after the other, each with as many steps as `settings` says
    and localized anew (`again`) among the facts `known`. Raises ValueError for another method, and as `finetune` and `sequential` do.
    """
    trained = objective(method)
    if method != "sequential":
        return finetune(model, split, mask, trained, settings, texts, seed, forget=trained_on(split))

    # its measurements on the way are not needed here: few facts will do
    localize = again(known, split, mask, seed)
    return sequential(model, split, localize, by_finetuning(trained, settings, texts), slices, seed, texts=texts, n_retain=4).edit


def again(known: Facts, split: Split, mask: Mask, seed: int = 0, **options) -> Localize:
    """How `sequential` finds the mask of this name for each slice, on the model as edited so far.

    Partners come from facts that are not edited. Where the rule finds nothing among a slice's facts, the mask of all facts stays.
    `options` are those of `choose`; `seed` draws random masks.
    """
    edited = {fact.key for fact in split.forget}
    rest = known.where(lambda fact: fact.key not in edited)

    def localize(model: Model, facts: Facts, number: int) -> Mask:
        everyone = Facts((*rest, *facts), known.name)
        try:
            return choose(model, everyone, replace(split, forget=facts), [mask.name], draw=seed, **options).masks[mask.name]
        except SelectionError:
            return mask

    return localize


def objective(method: str) -> str:
    """What a method trains the facts to. Raises ValueError for another method."""
    if method not in OBJECTIVES:
        raise ValueError(f"method {method!r}; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[method]


def trained_on(split: Split) -> Facts:
    """The facts that an edit is trained on."""
    return split.attack_train if _whole(split) else split.forget


def read_on(split: Split) -> Facts:
    """The facts that say what an edit did."""
    return split.attack_test if _whole(split) else split.forget


def _whole(split: Split) -> bool:
    return split.spec.startswith("answer-")
