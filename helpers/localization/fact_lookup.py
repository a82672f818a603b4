"""Fact lookup: in which MLPs does a model turn a name into the fact? Two ways, both by a rule written down.

`counterfact`, the paper's semi-automatic way (spec section 3.2), by path patching:

1. Extraction heads: the `n_heads` heads of largest |score| on the logits (`path_patching.head_paths`; 10 in the
   paper), or all whose bootstrap interval over facts excludes 0 (`"calibrated"`).
2. Receiver: what they read. As the residual it lies before the lowest extraction layer (below), which follows
   from the heads and is no constant.
3. Lookup MLPs: |score_ℓ − score_last| > `threshold`, .02 in the paper; or those whose bootstrap interval of
   that difference excludes 0 (`"calibrated"`). score_last is the last layer's, which has no path: exactly 0 here.

`sports`, the paper's way by hand (spec section 3.1), from the same three pieces of evidence:

1. Probes of the answer at the name's last token, residual i being that after block i − 1 (0: the embeddings).
   With rise(i) = (accuracy(i) − majority class) / (its maximum over i), an MLP ℓ is a candidate from the first i
   with rise(i) ≥ `begin` to the first i with rise(i) ≥ `end`, i = ℓ + 1 (if the embeddings pass: from layer 0).
   Defaults .4 and .9: .4 gives the paper's first layer on its own three probe curves (2, 2 and 1).
2. Attention: with every later token kept from attending to the name in layers ≥ ℓ, let kept(ℓ) be the share of
   LD that stays, between 0 (cut everywhere) and 1 (nowhere). Once kept ≥ `moved` (.9) for good, the fact has
   left the name, so MLP ℓ can count only if kept(ℓ + 1) is not there yet.
3. Extraction heads as above: MLP ℓ must lie below the lowest extraction layer.

The lowest extraction layer is the lowest of the chosen heads' layers after those are left out which, taken from
below, hold at most `negligible` (.05) of the summed |score|: the tenth head of a small model can be noise in layer 0.

Both return a `Lookup` with the layers, a reason for every layer, and the tables behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch

from helpers.chunks import over_prompts
from helpers.facts import Facts
from helpers.interventions import KnockOut
from helpers.localization import probes
from helpers.localization.counterfactual import Pairs
from helpers.localization.engine import Run, flush_right
from helpers.localization.evidence import component_scores, intervals, resamples, top
from helpers.localization.path_patching import head_paths, receiver_paths
from helpers.localization.recovery import describe, measure
from helpers.models import Component, Model
from helpers.prompts import PromptSet
from helpers.sites import Batch, TracingError

PUBLISHED_THRESHOLD = 0.02


@dataclass(frozen=True, eq=False)
class Lookup:
    """A choice of MLP layers.

    `layers` may be empty: `evidence` then says why. `evidence` has one row a layer with the columns `layer`, `chosen`,
    `reason` and the numbers that decided; `heads` are the extraction heads and `extraction_layers` theirs from the
    lowest on; `tables` holds the full tables, per-fact rows included, by name.
    """

    layers: tuple[int, ...]
    rule: str
    evidence: pd.DataFrame = field(repr=False)
    heads: tuple[str, ...]
    extraction_layers: tuple[int, ...]
    tables: dict[str, pd.DataFrame] = field(repr=False)

    @property
    def units(self) -> list[str]:
        """The chosen MLPs as `masks.mask` takes them."""
        return [f"mlp {layer}" for layer in self.layers]


def counterfact(
    model: Model,
    pairs: Pairs,
    n_heads: int | str = 10,
    threshold: float | str = PUBLISHED_THRESHOLD,
    receiver: str = "residual",
    negligible: float = 0.05,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
) -> Lookup:
    """Lookup MLPs by two stages of path patching; the rule stands at the top of this file.

    `receiver` is `"residual"` or `"heads"` (see `path_patching.receiver_paths`); `level`, `samples` and `seed` are
    those of the bootstrap. Raises `TracingError` if no head is chosen.
    """
    direct = head_paths(model, pairs, batch_size)
    scores = component_scores(direct)
    heads = extraction_heads(direct, n_heads, level, samples, seed)
    lowest = lowest_layer(scores[heads], negligible)
    read_by = [head for head in heads if Component.parse(head).layer >= lowest]
    written = receiver_paths(model, pairs, read_by, receiver, batch_size=batch_size)
    last = f"mlp {model.n_layers - 1}"
    found = intervals(written, None, level, samples, seed).set_index("component")
    drawn = resamples(written, None, samples, seed).pipe(lambda d: d.sub(d[last], axis=0))
    edges = drawn.quantile([(1 - level) / 2, (1 + level) / 2]).to_numpy()
    rows = []
    for i, (component, row) in enumerate(found.iterrows()):
        layer, difference = Component.parse(component).layer, row["score"] - found.loc[last, "score"]
        low, high = edges[:, i]
        if threshold == "calibrated":
            chosen, test = bool(low > 0 or high < 0), f"interval of the effect {low:+.3f} to {high:+.3f}"
        else:
            chosen, test = bool(abs(difference) > threshold), f"|effect| {abs(difference):.3f}, threshold {threshold}"
        if receiver == "residual" and layer >= lowest:
            chosen, test = False, f"not below the extraction layers, which begin at {lowest}"
        number = {"score": row["score"], "difference": difference, "low": low, "high": high}
        rows.append({"layer": layer, "chosen": chosen, "reason": test, **number})
    rule = f"counterfact: heads {n_heads}, receiver {receiver} at layer {lowest}, threshold {threshold}"
    return _lookup(rows, rule, heads, lowest, {"heads": direct, "mlps": written})


def sports(
    model: Model,
    pairs: Pairs,
    prompts: PromptSet,
    begin: float = 0.4,
    end: float = 0.9,
    moved: float = 0.9,
    n_heads: int | str = 10,
    negligible: float = 0.05,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
) -> Lookup:
    """Lookup MLPs from probes, attention cuts and extraction heads; the rule stands at the top of this file.

    `prompts` are for the probes: many subjects of one relation with few answers, in any format (the paper takes
    500 athletes); `pairs` are for attention and heads. `tables` holds `probes` (position, layer, fold, accuracy,
    chance), `attention` and `heads`. Raises `ValueError` where probes cannot be fitted or read nothing at the name.
    """
    read = probe_curves(model, prompts, seed, batch_size)
    curves = read.groupby(["position", "layer"])[["accuracy", "chance"]].mean()
    name, at_last = curves.loc["name"], curves.loc["last"]
    first, final = candidates(name["accuracy"].tolist(), name["chance"].mean(), begin, end)
    cuts = attention_cuts(model, pairs, batch_size)
    kept = component_scores(cuts.rename(columns={"from_layer": "component"}))
    direct = head_paths(model, pairs, batch_size)
    heads = extraction_heads(direct, n_heads, level, samples, seed)
    lowest = lowest_layer(component_scores(direct)[heads], negligible)
    gone = left_at(kept.tolist(), moved)
    above = component_scores(direct)[heads].abs().groupby(lambda head: Component.parse(head).layer).sum()
    rows = []
    for layer in range(model.n_layers):
        if not first <= layer <= final:
            reason = f"name probe: rises between {begin:.0%} and {end:.0%} in layers {first} to {final} only"
        elif layer + 1 >= gone:
            reason = f"attention: the fact has left the name, {moved:.0%} stays if it is cut off from layer {gone} on"
        elif layer >= lowest:
            reason = f"heads: not below the extraction layers, which begin at {lowest}"
        else:
            reason = "chosen: the fact becomes readable at the name, and is fetched from it by layers above"
        number = {f"{at}_accuracy": curve["accuracy"][layer + 1] for at, curve in (("name", name), ("last", at_last))}
        number |= {"chance": name["chance"].mean(), "kept_if_cut_above": kept[layer + 1]}
        number["head_score"] = above.get(layer, 0.0)
        rows.append({"layer": layer, "chosen": reason.startswith("chosen"), "reason": reason, **number})
    rule = f"sports: name probe {begin} to {end} of its rise, attention {moved}, below layer {lowest}"
    return _lookup(rows, rule, heads, lowest, {"probes": read, "attention": cuts, "heads": direct})


def candidates(accuracy: Sequence[float], chance: float, begin: float = 0.4, end: float = 0.9) -> tuple[int, int]:
    """First and last MLP layer during which a probe at the name rises, from its accuracy after 0, 1, 2 … blocks."""
    first, last = (probes.arrival(accuracy, chance, share) for share in (begin, end))
    return max(first - 1, 0), max(last - 1, 0)


def left_at(kept: Sequence[float], moved: float = 0.9) -> int:
    """The first layer from which on the name is not needed: from there kept(ℓ) stays at or above `moved`."""
    return 1 + max((layer for layer, share in enumerate(kept) if share < moved), default=-1)


def extraction_heads(
    table: pd.DataFrame, n_heads: int | str = 10, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> list[str]:
    """The heads that matter in a table of `head_paths`, by falling |score|. Raises `TracingError` if there are none."""
    if n_heads == "calibrated":
        found = intervals(table, None, level, samples, seed)
        scores = found[found["nonzero"]].set_index("component")["score"]
        heads = top(scores, len(scores))
    else:
        heads = top(component_scores(table), n_heads)
    if not heads:
        raise TracingError(f"n_heads {n_heads!r}: no head is chosen; give a number, or more facts")
    return heads


def lowest_layer(scores: pd.Series, negligible: float = 0.05) -> int:
    """The lowest layer of these heads that counts: those below it hold at most this share of their summed |score|."""
    layers = pd.Series([Component.parse(head).layer for head in scores.index], index=scores.index)
    below = scores.abs().groupby(layers).sum().sort_index().cumsum() / scores.abs().sum()
    return int(below.index[below > negligible][0])


def probeable(facts: Facts, least: int = 3) -> Facts:
    """Those facts whose answer `least` of them share; none if that leaves fewer than two answers. Three: one held out, two to fit a probe to."""
    often = {answer for answer, n in facts.counts().items() if n >= least}
    return facts.where(lambda fact: fact.answer in often and len(often) > 1)


def probe_curves(model: Model, prompts: PromptSet, seed: int = 0, batch_size: int = 64) -> pd.DataFrame:
    """`probes.cross_validate` of the answer, at the name's last token and the prompt's: `position` name and last."""
    labels = [fact.answer for fact in prompts.facts]
    tables = []
    for position, where in {"name": "subject_last", "last": "last"}.items():
        features = probes.residuals(model, prompts, where, batch_size)
        tables.append(probes.cross_validate(features, labels, seed=seed).assign(position=position))
    return pd.concat(tables, ignore_index=True)[["position", "layer", "fold", "accuracy", "chance"]]


def attention_cuts(model: Model, pairs: Pairs, batch_size: int = 64) -> pd.DataFrame:
    """No token after the name may attend to it in any layer ≥ `from_layer`, for every start and for none.

    One row a start (0 … n_layers, the last of which cuts nothing) and fact: `subject`, `relation`, `from_layer`,
    `ld_corrupt` (all layers cut), `ld_clean`, `ld_patched`. kept(ℓ) is their ratio of means.
    """

    def work(rows: torch.Tensor) -> pd.DataFrame:
        part = pairs[rows]
        run = Run(model, flush_right(part.clean))
        subject = run.batch.at("subject")
        after = beyond(run.batch)
        ld = [
            measure(run.edited([KnockOut(l, after, subject) for l in range(start, model.n_layers)]), part.answers)["ld"]
            for start in range(model.n_layers + 1)
        ]
        base = {"fact": rows, **describe(part.clean), "ld_clean": ld[-1], "ld_corrupt": ld[0]}
        return pd.concat([pd.DataFrame(base | {"from_layer": l, "ld_patched": x}) for l, x in enumerate(ld)])

    return pd.concat(over_prompts(work, model, pairs.clean, batch_size)).sort_values(["from_layer", "fact"], ignore_index=True)


def beyond(batch: Batch) -> torch.Tensor:
    """Every real token after the subject, booleans (n, length). Raises `TracingError` for a prompt without any."""
    after = (torch.arange(batch.tokens.shape[1]) >= batch.subject[:, 1:]) & batch.mask
    if not after.any(1).all():
        raise TracingError("a prompt ends with its subject: there is no attention from later tokens to cut")
    return after


def _lookup(rows: list[dict], rule: str, heads: Sequence[str], lowest: int, tables: dict) -> Lookup:
    evidence = pd.DataFrame(rows)
    layers = tuple(int(layer) for layer in evidence.loc[evidence["chosen"], "layer"])
    found = {Component.parse(head).layer for head in heads}
    return Lookup(layers, rule, evidence, tuple(heads), tuple(sorted(l for l in found if l >= lowest)), tables)
