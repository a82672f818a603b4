"""Localized fine-tuning: train the masked weights on the facts, get an edit, leave the model as it was.

    edit = finetune(model, split, mask(model, ["mlp 1", "mlp 2", "mlp 3"]), "edit")

Each step minimises λ · forget loss + retain cross-entropy + text cross-entropy (spec section 4.1). Nothing
below the lowest masked block is differentiated or computed twice.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from helpers import prompts as formats
from helpers.facts import Facts
from helpers.masks import Mask
from helpers.models import Model
from helpers.prompts import PromptSet
from helpers.provenance import text_hash
from helpers.splits import Split
from helpers.unlearning.edit import Edit
from helpers.unlearning.objectives import RMU, Objective, Relearn, Targets, objective as objective_of
from helpers.unlearning.terms import Sequences, Term, answer_term, draws, reference_log_p, rmu_terms, text_term
from helpers.unlearning.texts import general_texts
from helpers.unlearning.training import Settings, TrainingError, Watch, train
from helpers.unlearning.weights import MaskedWeights


def finetune(model: Model, split: Split, mask: Mask, objective: str | Objective = "edit", settings: Settings = Settings(),
             texts: Sequence[str] | None = None, seed: int = 0, *, forget: Facts | None = None,
             checkpoint: Path | str | None = None, watch: Watch | None = None) -> Edit:
    """Train the masked weights; the model itself is the same before and after, bit for bit.

    Args:
        split: `forget` is trained to the objective, `retain_train` to its true answers.
        mask: which weights may change.
        objective: a name (`edit`, `unlearn`, `ascent`, `graddiff`, `npo`, `simnpo`, `rmu`, `relearn`) or an `Objective`.
        texts: general text for the third term; None takes the tiny models' own kind. Give a large model real text.
        seed: decides which examples each step draws. Same seed, machine and thread count: same bits.
        forget: a part of the forget set to train on, e.g. `split.attack_train` in whole-sport editing.
        checkpoint: a file to continue from after a kill; it is removed at the end.
        watch: measures the model as trained so far; called with the number of steps made, adds columns to the history.

    Raises `TrainingError` for an empty forget set, facts in both sets, an edit answer equal to the true one, no
    texts; `SelectionError` for a mask of another model. A loss that becomes NaN stops training with the last
    good weights: there is a warning, and `edit.record["stopped"]` says so.
    """
    trained = MaskedWeights(model, mask, settings.masters)
    return fit(model, trained, mask, split, objective, settings, texts, seed, forget=forget, checkpoint=checkpoint, watch=watch)


def fit(model: Model, trained, mask: Mask, split: Split, objective: str | Objective, settings: Settings,
        texts: Sequence[str] | None, seed: int, *, forget: Facts | None = None, checkpoint: Path | str | None = None,
        watch: Watch | None = None, method: str = "") -> Edit:
    """`finetune` for anything that trains (see `helpers.unlearning.weights`)."""
    objective = objective_of(objective)
    forget = split.forget if forget is None else forget
    check_facts(forget, split)
    texts = general_texts() if texts is None and "text" in objective.terms else list(texts or ())
    terms = build_terms(model, split, forget, objective, settings, texts, seed, mask)
    record = {"method": method or f"finetune {objective.name}", "objective": {"name": objective.name, **asdict(objective)},
              "settings": asdict(settings), "seed": seed, "split": split.record, "n_trained_on": len(forget),
              "texts": {"n": len(texts), "hash": text_hash("\0".join(texts))[:16]}}
    identity = text_hash(json.dumps([record, forget.digest(), mask.digest, _weights_sum(model)], default=str))
    file = Path(checkpoint) if checkpoint else None
    with trained:
        history, stopped = train(model, trained, terms, settings, record["method"], file, identity, watch)
        new = trained.values()
    return Edit.of(model, mask, new, {**record, "stopped": stopped}, history)


def check_facts(forget: Facts, split: Split) -> None:
    """Raise `TrainingError` for facts that cannot be trained on."""
    if not len(forget):
        raise TrainingError("the forget set is empty: there is nothing to edit")
    kept = {f.key for f in (*split.retain_train, *split.retain_test)}
    for fact in forget:
        if fact.key in kept:
            raise TrainingError(f"{fact.subject!r} ({fact.relation.name}) is both to be forgotten and to be retained")
        if fact.edit == fact.answer:
            raise TrainingError(f"{fact.subject!r}: the edit answer {fact.edit!r} is the true answer")


def build_terms(model: Model, split: Split, forget: Facts, objective: Objective, settings: Settings, texts: Sequence[str], seed: int,
                mask: Mask) -> list[Term]:
    """The terms of the objective, with everything that each step will draw."""
    asked = questions(model, forget, split, settings.format)
    reference = reference_log_p(model, asked, settings.chunk) if objective.needs_reference else None
    drawn = lambda name, n: draws(n, settings.batch, settings.steps, seed, name)
    terms = []
    if "forget" in objective.terms:
        targets = Targets(asked.answer_ids, asked.edit_ids, reference)
        terms.append(answer_term(model, "forget", settings.forget_weight, asked, objective, targets, drawn("forget", len(asked))))
    if "retain" in objective.terms:
        if not len(split.retain_train):
            raise TrainingError("the split has no facts to retain; train with terms=('forget',) to do without")
        kept = questions(model, split.retain_train, split, settings.format)
        targets = Targets(kept.answer_ids, kept.edit_ids)
        terms.append(answer_term(model, "retain", settings.retain_weight, kept, Relearn(), targets, drawn("retain", len(kept))))
    if "text" in objective.terms:
        if not len(texts):
            raise TrainingError(f"the objective {objective.name!r} has a text term and there are no texts")
        sequences = Sequences.of_texts(model.tokenizer, texts, settings.text_tokens)
        terms.append(text_term(model, settings.text_weight, sequences, drawn("text", len(sequences))))
    if isinstance(objective, RMU):
        layer = max(mask.layers) if objective.layer is None else objective.layer
        if not min(mask.layers) <= layer < model.n_layers:
            raise TrainingError(f"RMU reads after block {layer}: it must be one of {model.n_layers} and not below the lowest "
                                f"masked one, {min(mask.layers)}")
        terms = rmu_terms(model, objective, terms, layer, seed, settings.chunk)
    return terms


def questions(model: Model, facts: Facts, split: Split, format: str) -> PromptSet:
    """The facts in one format; solved examples come from the retain set, never from facts that are edited."""
    options = {"pool": split.retain_train} if "pool" in inspect.signature(formats.FORMATS.get(format, len)).parameters else {}
    asked = formats.build(model.tokenizer, facts, format, **options)
    if asked.whole:
        raise TrainingError(f"format {format!r} is scored on whole answers; train on one whose first answer token decides")
    return asked


def _weights_sum(model: Model) -> float:
    """Tells models apart well enough to refuse a checkpoint of another one."""
    return sum(p.detach().sum(dtype=torch.float64).item() for p in model.hf.parameters())
