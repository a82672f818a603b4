"""How deep an edit goes: activations moved between the original and the edited model, layer by layer.

    restore   the original model's residual is put into the edited one: is the true answer back? Above the last
              edited block it always is. Where it comes back earlier, the blocks above still know what to do with it.
    erase     the edited model's residual is put into the original: is the true answer gone? If the original still
              gives it, the fact was there in the edited model's residual, and the edit merely hides it further up.

`erase` at the last position is the second stage of the Unlearning Depth Score (arXiv 2605.24614), which
`depth_score` computes. Its first stage, the same with a model that never learned the fact, uses such a model if there is
one, and else the original model asked about an invented name of as many tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pandas as pd
import torch

from helpers import metrics
from helpers.attacks.invented import CONTROL, invent_names
from helpers.attacks.rows import FACT, AttackError, forgotten, tidy, with_readings
from helpers.chunks import over_prompts
from helpers.facts import Facts
from helpers.interventions import Intervention
from helpers.localization.engine import Run, flush_right
from helpers.models import Model
from helpers.progress import progress
from helpers.prompts import PromptSet
from helpers.sites import Batch
from helpers.splits import Split
from helpers.unlearning.edit import Edit
from helpers.unlearning.finetune import questions

POSITIONS = ("all", "subject_last", "last")
ABSENT = "model without the facts"
THRESHOLD = 0.05  # nats; the published choice of layers that encode the fact


def patch(model: Model, edit: Edit, split: Split, *, format: str = "one_shot", positions: Sequence[str] = POSITIONS,
          directions: Sequence[str] = ("restore", "erase", "reference"), reference: Model | None = None, n_forget: int | None = None, seed: int = 0,
          batch_size: int = 64) -> pd.DataFrame:
    """Attack `patch`: one setting a direction, position and layer (0 = embeddings, ℓ + 1 = after block ℓ), on the forget set.

    `reference` is a model of the same shape and tokenizer that never learned the facts; its activations, or without it those of
    invented names, go into the original model as those of `erase` do (direction `reference`, with a control). Further
    columns: `direction`, `position`, `layer`, `logp_true` (nats), and `logp_base`, the same without a patch.

    This compares models, it is no attack that somebody without the original weights could make.
    """
    if edit is None:
        raise AttackError("patching moves activations between the original and the edited model: it needs an edit")
    unknown = sorted(set(directions) - {"restore", "erase", "reference"})
    if unknown:
        raise AttackError(f"patching: directions {unknown}; there are restore, erase and reference")
    facts = forgotten(split, n_forget)
    asked = questions(model, facts, split, format)
    if reference is not None and (reference.n_layers, reference.d_model) != (model.n_layers, model.d_model):
        raise AttackError(f"patching: the reference {reference.name!r} has {reference.n_layers} layers of width "
                          f"{reference.d_model}, {model.name!r} has {model.n_layers} of {model.d_model}")
    names = _stand_ins(model, split, facts, format, asked, seed) if reference is None and "reference" in directions else asked
    others = model if reference is None else reference

    def work(rows: torch.Tensor) -> pd.DataFrame:
        part, batch = asked[rows], flush_right(asked[rows])
        tables, original = [], Run(model, batch)
        with edit.applied(model):
            edited = Run(model, batch)
            if "restore" in directions:
                tables += _patched("restore", edited, original, part, facts, positions)
        if "erase" in directions:
            tables += _patched("erase", original, edited, part, facts, positions)
        if "reference" in directions:
            absent = Run(others, flush_right(names[rows]))
            control = CONTROL if reference is None else ABSENT
            tables += _patched("reference", original, absent, part, facts, positions, control)
        return pd.concat(tables)

    table = pd.concat(over_prompts(work, model, asked, batch_size))
    return table.sort_values(["direction", "position", "layer"], kind="stable", ignore_index=True)


def depth_score(rows: pd.DataFrame, position: str = "last", threshold: float = THRESHOLD) -> pd.DataFrame:
    """One row a fact from rows of `patch`: `uds` from 0 (all of the fact is still there) to 1 (as if never learned).

    With Δ the loss of log p(true answer) in nats by a patch at layer ℓ, over the layers where Δ_reference > threshold:

        uds = Σ Δ_reference · clip(Δ_erase / Δ_reference, 0, 1) / Σ Δ_reference

    `layers` counts these layers; without any, uds is missing. Raises `AttackError` if a direction is missing in the rows.
    """
    chosen = rows[(rows["attack"] == "patch") & (rows["position"] == position)] if "position" in rows else rows[:0]
    lost = chosen.assign(lost=chosen.get("logp_base", 0) - chosen.get("logp_true", 0))
    lost = {name: part.set_index([*FACT, "layer"])["lost"] for name, part in lost.groupby("direction")} if len(chosen) else {}
    missing = {"erase", "reference"} - set(lost)
    if missing:
        raise AttackError(f"depth score: no rows of patch with direction {' and '.join(sorted(missing))} at {position!r}")
    both = pd.DataFrame({"reference": lost["reference"], "erase": lost["erase"].reindex(lost["reference"].index)})
    counted = both[both["reference"] > threshold]
    erased = counted["erase"].clip(lower=0).clip(upper=counted["reference"])
    by_fact = pd.DataFrame({"erased": erased, "reference": counted["reference"]}).groupby(level=FACT, sort=False)
    sums = by_fact.sum().assign(layers=by_fact.size()).reindex(both.groupby(level=FACT, sort=False).size().index)
    table = pd.DataFrame({"uds": sums["erased"] / sums["reference"], "layers": sums["layers"].fillna(0).astype(int)})
    return table.reset_index()


def _patched(direction: str, base: Run, source: Run, prompts: PromptSet, facts: Facts, positions: Sequence[str],
             control: str = "") -> Iterator[pd.DataFrame]:
    """The base run with the source run's residual, for every position and layer. The model must have the base run's weights."""
    answers = prompts.answer_ids[:, None]
    before = base.logits.log_softmax(-1).cpu().gather(1, answers)[:, 0].double()
    for position in positions:
        where = base.batch.mask if position == "all" else base.batch.at(position)
        for layer in progress(range(base.model.n_layers + 1), f"patching, {direction}", base.model.n_layers + 1):
            site = ("resid_post", layer - 1) if layer else ("resid_pre", 0)
            logits = base.edited([Intervention(*site, where, value=source[site])]).cpu()
            after = logits.log_softmax(-1).gather(1, answers)[:, 0].double()
            table = with_readings(metrics.scores(logits, prompts), facts).assign(group="forget")
            yield tidy(table, "patch", f"{direction}, {position}, layer {layer}", control=control, direction=direction,
                       position=position, layer=layer, logp_true=after.numpy(), logp_base=before.numpy())


def _stand_ins(model: Model, split: Split, facts: Facts, format: str, asked: PromptSet, seed: int) -> PromptSet:
    """The same prompts about invented names, token for token alike but for the name."""
    others = [*(fact for fact in split.forget if fact not in facts), *split.retain_train, *split.retain_test]
    names = invent_names(facts, others, model.tokenizer, seed)
    prompts = questions(model, Facts(tuple(replace(fact, subject=name) for fact, name in zip(facts, names))), split, format)
    one, other = Batch.of(asked), Batch.of(prompts)
    if not (torch.equal(one.mask, other.mask) and torch.equal(one.subject, other.subject)):
        raise AttackError("patching: within these prompts the invented names are not as many tokens as the subjects; "
                          "pass a reference model")
    return prompts
