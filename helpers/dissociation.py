"""A model whose early blocks cannot hold the facts: do localizations leave them alone, and find the ones in the middle?

    frozen = frozen_blocks("tiny-llama3-late")                 # from the recipe beside its weights
    score(model, choices.masks, frozen, lookup.extraction_layers)

The blocks of such a model (`helpers.pretrain`) fall into three: `frozen` ones, fixed before the first fact was learned, which
hold none; `middle` ones, which learned the facts and lie below the heads that fetch the answer; and `late` ones, from the
lowest of these heads on. Only the first border is known for certain. The second is measured, on the trained model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from helpers import masks
from helpers.checkpoints import BUNDLED
from helpers.localization.evidence import regions
from helpers.masks import Mask
from helpers.models import Model

BY_CHANCE = "by chance"


class DissociationError(ValueError):
    """A model of which nobody knows where its facts cannot be."""


def frozen_blocks(name: str) -> int:
    """How many blocks were fixed while the facts were learned, from `recipe.json` beside the weights of a bundled name or folder.

    Raises `DissociationError` where there is no such folder or recipe, and where nothing was fixed.
    """
    folder = next((path for path in (BUNDLED / name, Path(name).expanduser()) if name and (path / "config.json").is_file()), None)
    if folder is None:
        there = ", ".join(sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))) or "none"
        raise DissociationError(f"no model {name!r} here (bundled: {there}); train it with: python -m helpers.pretrain {name}")
    recipe = folder / "recipe.json"
    if not recipe.is_file():
        raise DissociationError(f"{name}: no recipe.json beside the weights says which blocks could not learn facts")
    frozen = json.loads(recipe.read_text(encoding="utf-8")).get("frozen_blocks", 0)
    if not frozen:
        raise DissociationError(f"{name}: its recipe froze no blocks, so every one of them may hold facts")
    return frozen


def middle(model: Model, frozen: int, extraction: Sequence[int]) -> list[int]:
    """The layers that learned facts and lie below the lowest of `extraction`, or below the top where there is none.

    Heads up to layer `frozen` are passed over: no MLP below them can have looked anything up.
    """
    return list(range(frozen, min((layer for layer in extraction if layer > frozen), default=model.n_layers)))


def score(model: Model, choices: Mapping[str, Mask], frozen: int, extraction: Sequence[int]) -> pd.DataFrame:
    """One row a choice, and one (`by chance`) for all MLPs: `choice`, `units`, `frozen`, `middle` and `late`, shares of its weights.

    `found`: nothing lies in frozen blocks and more than half in the middle. `extraction`: layers of the heads that fetch the answer.
    """
    everywhere = masks.mask(model, [f"mlp {layer}" for layer in range(model.n_layers)])
    between = middle(model, frozen, extraction)
    rows = regions(model, {**choices, BY_CHANCE: everywhere}, range(frozen), between)
    table = rows.rename(columns={"lookup": "frozen", "extraction": "middle", "elsewhere": "late"})
    units = [", ".join(choices[name].units) if name in choices else "all MLPs" for name in table["choice"]]
    table = table.assign(units=units, found=(table["frozen"] == 0) & (table["middle"] > 0.5))
    return table[["choice", "units", "frozen", "middle", "late", "found"]]


def places(model: Model, count: int, frozen: int, lookup: Sequence[int]) -> dict[str, Mask]:
    """Where to edit, `count` MLPs each: those of `lookup` if there are any, the first ones, the first that learned facts, the last ones.

    Windows are called as everywhere else ("MLP 0-1"). The same MLPs come once, under the first name.
    """
    starts = dict.fromkeys((0, min(frozen, model.n_layers - count), model.n_layers - count))
    found = {"lookup": masks.mask(model, [f"mlp {layer}" for layer in lookup], "lookup")} if len(lookup) else {}
    for start in starts:
        name = f"MLP {start}-{start + count - 1}"
        window = masks.mask(model, [f"mlp {layer}" for layer in range(start, start + count)], name)
        if window.digest not in {other.digest for other in found.values()}:
            found[name] = window
    return found
