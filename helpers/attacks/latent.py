"""What the edited model still knows without saying it: probes and logit lens on its residual stream.

Both read one forward pass, at the last token of the name and at the last token of the prompt, before the first block
(layer 0) and after every block (ℓ + 1 = after block ℓ). Probes are fitted to facts that were retained, so a probe can read
a forgotten fact only where the edit left it in the form in which the model keeps its other facts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pandas as pd
import torch

from helpers import metrics
from helpers.attacks.rows import READINGS, AttackError, applied, asked_of, tidy, with_readings
from helpers.chunks import over_prompts
from helpers.facts import Facts
from helpers.localization import probes as linear
from helpers.localization.engine import Run, flush_right
from helpers.models import Model
from helpers.progress import progress
from helpers.prompts import PromptSet
from helpers.splits import Split
from helpers.unlearning.edit import Edit
from helpers.unlearning.finetune import questions
from helpers.unlearning.forward import logits_of

POSITIONS = ("subject_last", "last")
SHUFFLED = "shuffled labels"


def probe(model: Model, edit: Edit | None, split: Split, *, format: str = "one_shot", positions: Sequence[str] = POSITIONS,
          n_train: int | None = None, n_retain: int = 100, n_forget: int | None = None, penalty: float = 1.0, lens: bool = True, seed: int = 0,
          batch_size: int = 64) -> pd.DataFrame:
    """Attacks `probe` and `logit lens`, one setting a position and layer.

    Probes are trained on facts of `retain_train` (at most `n_train`, of the relations and with none of the subjects of the
    forget set), one multinomial regression a relation. `prob_*` of a probe is among the answers that it knows, of the lens as
    everywhere. The edit answer may be no class of the probe: then `prob_edit` is missing. Rows of group `retain` are
    facts that neither edit nor probe was trained on, the ceiling; those with the control `shuffled labels` come from
    probes trained on permuted labels, the floor. Further columns: `position`, `layer`.

    Raises `AttackError` where no probe can be trained: too few retain facts, one class only, or no class for any true
    answer. Facts that cannot be probed while others can are left out, with a warning.
    """
    groups = asked_of(split, n_retain, n_forget)
    lessons = {relation: _lessons(split, relation, n_train) for relation in dict.fromkeys(f.relation.name for f in split.forget)}
    lessons, pupils = _teachable(lessons, groups)
    training = Facts(tuple(f for facts in lessons.values() for f in facts))
    with applied(model, edit):
        asked = {name: questions(model, facts, split, format) for name, facts in {**groups, "train": training}.items()}
        found = {name: states(model, prompts, positions, batch_size) for name, prompts in asked.items()}
        tables = _lens(model, found, asked, groups, positions) if lens else []
    for relation in progress(lessons, "probing", len(lessons)):
        tables += _probe(relation, training, found, pupils, groups, positions, format, penalty, seed)
    return pd.concat(tables, ignore_index=True)


def upper_layers(rows: pd.DataFrame, by: Sequence[str] = (), position: str = "last") -> pd.DataFrame:
    """Each forgotten fact's readings by probes, averaged over the layers in the upper two thirds: one row a group of `by` and fact.

    So `top_true` is the share of these layers in which the true answer can be read, `top_edit` that of the edit answer.
    """
    chosen = (rows["attack"] == "probe") & (rows["control"] == "") & (rows["group"] == "forget") & (rows.get("position") == position)
    part = rows[chosen]
    part = part[part["layer"] > part["layer"].max() / 3] if len(part) else part
    return part.groupby([*by, "subject", "relation"], sort=False)[READINGS].mean().reset_index()


@torch.no_grad()
def states(model: Model, prompts: PromptSet, positions: Sequence[str] = POSITIONS, batch_size: int = 64) -> torch.Tensor:
    """(n, position, layer, d_model) fp32 on the CPU: `probes.residuals` at several positions of one pass."""

    def work(rows: torch.Tensor) -> torch.Tensor:
        batch = flush_right(prompts[rows])
        run, every, top = Run(model, batch), torch.arange(len(rows)), model.n_layers - 1
        layers = [*(("resid_pre", layer) for layer in range(model.n_layers)), ("resid_post", top)]
        at = torch.stack([batch.index(position) for position in positions], dim=1)
        return torch.stack([run[site][every[:, None], at].float().cpu() for site in layers], dim=2)

    return torch.cat(over_prompts(work, model, prompts, batch_size))


def _lessons(split: Split, relation: str, n_train: int | None) -> Facts:
    """Facts to train a relation's probe on: of other subjects, and with answers that two or more of them have."""
    named = {f.subject for f in split.forget}
    facts = split.retain_train.where(lambda f: f.relation.name == relation and f.subject not in named)[:n_train]
    counts = facts.counts()
    return facts.where(lambda f: counts[f.answer] > 1)


def _teachable(lessons: dict[str, Facts], groups: dict[str, Facts]) -> tuple[dict[str, Facts], dict[str, list[bool]]]:
    """The relations that can be probed, and which facts of each group their probes can answer."""
    served, reasons = {}, []
    for relation, facts in lessons.items():
        classes, asked = facts.counts(), [f.answer for f in groups["forget"] if f.relation.name == relation]
        unknown = ", ".join(sorted({repr(answer) for answer in asked if answer not in classes}))
        if len(classes) < 2:
            reasons.append(f"relation {relation!r} has {len(facts)} retain facts to train on, with the answers {dict(classes)}, "
                           "and a probe needs two answers with two facts each")
        elif unknown:
            reasons.append(f"relation {relation!r} has fewer than two retain facts with the answer {unknown}")
        if len(classes) > 1 and any(answer in classes for answer in asked):
            served[relation] = facts
    if not served:
        raise AttackError(f"no probe can be trained: {'; '.join(reasons)}")
    if reasons:
        warnings.warn(f"not probed: {'; '.join(reasons)}", stacklevel=3)
    answers = {relation: set(facts.counts()) for relation, facts in served.items()}
    return served, {name: [f.answer in answers.get(f.relation.name, ()) for f in facts] for name, facts in groups.items()}


def _probe(relation: str, training: Facts, found: dict[str, torch.Tensor], pupils: dict[str, list[bool]],
           groups: dict[str, Facts], positions: Sequence[str], format: str, penalty: float, seed: int) -> list[pd.DataFrame]:
    """Rows of one relation's probes, with true and with shuffled labels; all positions and layers are fitted at once."""
    rows = [i for i, f in enumerate(training) if f.relation.name == relation]
    labels = [training[i].answer for i in rows]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    n_layers, tables = found["train"].shape[2], []
    for control, given in (("", labels), (SHUFFLED, [labels[i] for i in order])):
        fitted = linear.fit(found["train"][rows].flatten(1, 2), given, penalty)
        for group, facts in groups.items():
            chosen = [i for i, f in enumerate(facts) if f.relation.name == relation and pupils[group][i]]
            if not chosen:
                continue
            p = fitted.logits(found[group][chosen].flatten(1, 2)).softmax(-1)
            readings = _readings(p, facts[chosen], fitted.classes)
            for number, reading in enumerate(readings):
                position, layer = positions[number // n_layers], number % n_layers
                reading = reading.assign(group=group, format=format)
                where = {"position": position, "layer": layer}
                tables.append(tidy(reading, "probe", f"{position}, layer {layer}", control=control, **where))
    return tables


def _readings(p: torch.Tensor, facts: Facts, classes: tuple[str, ...]) -> list[pd.DataFrame]:
    """For each probe, from probabilities (probe, n, class), fact columns and readings."""
    columns = {"subject": [f.subject for f in facts], "relation": [f.relation.name for f in facts],
               "answer": [f.answer for f in facts], "edit": [f.edit for f in facts]}
    best, every = p.argmax(-1), torch.arange(len(facts))
    tables = [dict(columns) for _ in p]
    for name, wanted in (("true", columns["answer"]), ("edit", columns["edit"])):
        label = linear.encode(wanted, classes)
        chance = p[:, every, label.clamp(min=0)].double().masked_fill(label < 0, float("nan"))
        for table, prob, top in zip(tables, chance, (best == label).double()):
            table |= {f"prob_{name}": prob.numpy(), f"top_{name}": top.numpy()}
    return [pd.DataFrame(table | {"top_other": 1 - table["top_true"] - table["top_edit"]}) for table in tables]


@torch.no_grad()
def _lens(model: Model, found: dict[str, torch.Tensor], asked: dict[str, PromptSet], groups: dict[str, Facts],
          positions: Sequence[str]) -> list[pd.DataFrame]:
    """Each state as the model's own final norm and unembedding read it."""
    tables = []
    for group, facts in groups.items():
        for p, position in enumerate(positions):
            for layer in range(model.n_layers + 1):
                hidden = model.final_norm(found[group][:, p, layer].to(model.device, model.dtype))
                rows = with_readings(metrics.scores(logits_of(model, hidden).cpu(), asked[group]), facts).assign(group=group)
                tables.append(tidy(rows, "logit lens", f"{position}, layer {layer}", position=position, layer=layer))
    return tables
