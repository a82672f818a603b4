"""The masks that experiments compare, by the names that `data/claims.yaml` gives them.

    chosen = choose(model, known, split, ["lookup", "causal tracing MLPs", "windows", "random"], seed=0)
    chosen.masks["lookup"], chosen.lookup.rule, chosen.layers("lookup")

Fact lookup decides first; its number of weights is the budget of every other choice, and its number of MLPs that of the random
and depth-matched ones. Localizations see the facts to be edited (with partners from all known facts); only the probes
of fact lookup are trained on all known facts. Nothing is computed that no name asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from helpers import masks, prompts, selection
from helpers.facts import Facts
from helpers.localization import attribution, causal_tracing, fact_lookup
from helpers.localization.counterfactual import pairs
from helpers.localization.evidence import component_scores
from helpers.masks import Mask, SelectionError
from helpers.models import Model
from helpers.splits import Split

SCORED = ("causal tracing", "causal tracing MLPs", "attribution", "attribution MLPs")
PLAIN = ("lookup", "everything", "all MLPs", "random", "random MLPs")
NAMES = (*PLAIN, *SCORED, "windows")
PROBED = 5  # subjects with an answer, from which on it is probed for: one in each fold


@dataclass(frozen=True, eq=False)
class Choices:
    """`masks` by name; `lookup`: how fact lookup chose (None where it was given), and `lookup_layers`; `scores` of attention blocks and MLPs."""

    masks: dict[str, Mask]
    lookup: fact_lookup.Lookup | None
    lookup_layers: tuple[int, ...]
    scores: dict[str, pd.Series] = field(repr=False)

    def layers(self, name: str) -> str:
        """The layers of a choice of MLPs or of parts of them, "2 3 4"; empty for any other choice."""
        units = self.masks[name].units
        return " ".join(map(str, self.masks[name].layers)) if units and all(unit.split()[0] in ("mlp", *masks.MLP) for unit in units) else ""

    def table(self) -> pd.DataFrame:
        """One row a choice: what it holds, how many weights, how far over the budget."""
        rows = [{"choice": name, "units": ", ".join(m.units), "weights": m.n_parameters, "overshoot": m.overshoot}
                for name, m in self.masks.items()]
        return pd.DataFrame(rows)


def choose(model: Model, known: Facts, split: Split, names: Sequence[str] = ("lookup",), *, lookup: Sequence[int] | None = None,
           given: Mapping[str, Mask] = {}, format: str = "cloze", n_facts: int = 64, samples: int = 3, seed: int = 0, draw: int | None = None,
           batch_size: int = 64) -> Choices:
    """The masks of these names for editing `split.forget`.

    Args:
        known: the facts the model knows; partners and probes come from them.
        names: of NAMES, or single windows ("MLP 2-4"); "windows" stands for every window of as many MLPs as fact lookup chose.
        lookup: layers of the lookup MLPs, where they are known already or chosen by hand.
        given: masks that are not to be found here, by name, such as the published ones (`presets.given`).
        n_facts: how many of the facts to be edited the localizations see, at most (a whole sport has hundreds).
        samples: noise samples of causal tracing.
        seed: of partners, probes and noise.
        draw: seed of the random masks, if it is another: runs that differ in it alone share all other masks.

    Fact lookup goes by `fact_lookup.sports` for facts of one relation whose answers can be probed for (two or more that PROBED subjects
    have), by `counterfact` with the calibrated threshold for all others. Raises `SelectionError` for an unknown name, and where fact lookup chooses no MLP.
    """
    unknown = [name for name in names if name not in NAMES and not is_window(name)]
    if unknown or not names:
        raise SelectionError(f"masks {', '.join(unknown) or '(none)'}: there are {', '.join(NAMES)}, and windows such as 'MLP 2-4'")
    draw = seed if draw is None else draw
    twins = pairs(model, split.forget[:n_facts], format, partners=known, seed=seed, minimum=2)
    lookup = given["lookup"].layers if lookup is None and "lookup" in given else lookup
    found = look_up(model, known, split, format=format, n_facts=n_facts, seed=seed, batch_size=batch_size) if lookup is None else None
    layers = tuple(lookup) if found is None else found.layers
    if not layers:
        raise SelectionError(f"{model.name}: fact lookup chooses no MLP ({found.rule}); name layers by hand: lookup=2,3,4 (notebook 02 shows the evidence)")
    flu = masks.mask(model, [f"mlp {layer}" for layer in layers], "lookup")
    scores, chosen = {}, {}
    sought = [name for name in names if name not in given]
    if any(name.startswith("causal tracing") for name in sought):
        scores["causal tracing"] = component_scores(causal_tracing.trace_components(model, twins.clean, ("attn", "mlp"),
                                                                                    samples=samples, seed=seed))
    if any(name.startswith("attribution") for name in sought):
        found_at_heads = attribution.attribute(model, twins, ("head", "mlp"))
        scores["attribution"] = selection.whole_units(component_scores(found_at_heads, "score"))
    for name in names:
        method = name.removesuffix(" MLPs")
        if name in given and name != "lookup":
            chosen[name] = given[name]
        elif name in SCORED:
            kinds = ("mlp",) if name.endswith("MLPs") else ("attn", "mlp")
            chosen[name] = selection.greedy(model, scores[method], flu.n_parameters, kinds, name)
        elif name == "windows":
            chosen |= {window.name: window for window in selection.windows(model, len(layers))}
        elif is_window(name):
            first, last = map(int, name.removeprefix("MLP ").split("-"))
            chosen[name] = masks.mask(model, [f"mlp {layer}" for layer in range(first, last + 1)], name)
        else:
            chosen[name] = {"lookup": lambda: flu, "everything": lambda: selection.everything(model),
                            "all MLPs": lambda: selection.all_mlps(model),
                            "random": lambda: selection.random_units(model, flu.n_parameters, draw),
                            "random MLPs": lambda: selection.random_mlps(model, len(layers), draw)}[name]()
    # the names of claims, under which rows are stored: a random mask is drawn anew with each seed, under one name
    return Choices({name: replace(mask, name=name) for name, mask in chosen.items()}, found, layers, scores)


def parse_layers(text: str) -> tuple[int, ...] | None:
    """Layers from a notebook's parameter, "2,3,4"; None where it is empty, so that fact lookup decides. Raises `SelectionError`."""
    layers = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in layers if not part.isdecimal()]:
        raise SelectionError(f"lookup={text!r}: {wrong[0]!r} is no layer; give numbers of layers such as 2,3,4, or nothing")
    return tuple(sorted({int(part) for part in layers})) or None


def is_window(name: str) -> bool:
    """Whether a name is that of a run of neighbouring MLPs, "MLP 2-4"."""
    first, _, last = name.removeprefix("MLP ").partition("-")
    return name.startswith("MLP ") and first.isdecimal() and last.isdecimal() and int(first) <= int(last)


def look_up(model: Model, known: Facts, split: Split, *, format: str = "cloze", n_facts: int = 64, seed: int = 0,
            batch_size: int = 64) -> fact_lookup.Lookup:
    """Fact lookup as `choose` goes by it; the arguments are the same. Its `layers` may be empty."""
    twins = pairs(model, split.forget[:n_facts], format, partners=known, seed=seed, minimum=2)
    relations = {fact.relation.name for fact in split.forget}
    probed = fact_lookup.probeable(known.where(lambda fact: fact.relation.name in relations), PROBED)
    if len(relations) > 1 or not len(probed):
        return fact_lookup.counterfact(model, twins, threshold="calibrated", seed=seed, batch_size=batch_size)
    return fact_lookup.sports(model, twins, prompts.build(model.tokenizer, probed, format), seed=seed, batch_size=batch_size)
