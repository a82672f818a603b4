"""Soft prompts: vectors learned in the input space, the same for every fact, that make the edited model answer.

    prompt       `size` vectors before every prompt (after the begin-of-text token)
    attention    the paper's variant (spec section 6.3), at the output of the embedding: x + softmax(W x · Kᵀ / √d) V with
                 one head and `size` learned pairs (K, V); V starts at 0, where it changes nothing

No weight of the model changes. The vectors are trained on the true answers of half the forgotten facts and read on the
other half; a second term keeps other facts right. Without it, as published (15 pairs, four restarts of 128 steps with 16
examples, learning rate 1e-5), an attack tends to wreck the model or to make everyone a footballer: read `retain` beside it.

All is in units of the model's own embeddings, so that one learning rate serves every model; no vector may become longer
than `limit` times their mean length (published: longer than 6, whatever the model).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch.utils.hooks import RemovableHandle

from helpers import metrics
from helpers.attacks.rows import AttackError, applied, asked_after, check_halves, check_trainable, tidy, with_readings
from helpers.facts import Facts
from helpers.models import Model
from helpers.prompts import PromptSet
from helpers.splits import Split
from helpers.unlearning.edit import Edit
from helpers.unlearning.finetune import questions
from helpers.unlearning.objectives import Relearn, Targets
from helpers.unlearning.terms import answer_term, draws
from helpers.unlearning.training import Settings, train
from helpers.unlearning.weights import Beside

SETTINGS = Settings(learning_rate=0.1, steps=60, batch=16)
# options of `soft_prompt`, as published; `limit` was 6 whatever the model, here it counts mean lengths of the model's embeddings
PUBLISHED = {"kind": "attention", "size": 15, "restarts": 4, "steps": (0, 128), "settings": replace(SETTINGS, learning_rate=1e-5, retain_weight=0.0)}


class Soft(Beside):
    """Learned tensors acting at the embedding's output while `with soft:` lasts; what a training loop needs, see
    `helpers.unlearning.weights`."""

    lowest, noisy = -1, False

    def __init__(self, model: Model, size: int, limit: float, seed: int):
        if size < 1 or limit <= 0:
            raise AttackError(f"soft prompt: size {size} and limit {limit:g}; at least one vector of a length above 0 is needed")
        self.model, self.size, self.limit = model, size, limit
        self.generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            every = model.embed(torch.arange(model.vocab_size, device=model.device)).float()
        self.unit = float(every.norm(dim=-1).mean()) / model.d_model**0.5
        self.tensors = [tensor.to(model.device).requires_grad_() for tensor in self.start(every / self.unit)]
        self.write()

    @abstractmethod
    def start(self, every: torch.Tensor) -> list[torch.Tensor]:
        """The tensors before training, given all embeddings (vocabulary, d) in our units."""

    @abstractmethod
    def act(self, embedded: torch.Tensor) -> torch.Tensor:
        """What the first block receives, from what it would have received (b, length, d), in our units, fp32."""

    @property
    def bounded(self) -> list[torch.Tensor]:
        """Those of the tensors whose rows `limit` bounds."""
        return self.tensors

    def register(self) -> list[RemovableHandle]:
        return [self.model.embed.register_forward_hook(self._hook)]

    def _hook(self, module, inputs, output: torch.Tensor) -> torch.Tensor:
        return self.act(output)

    def begin(self, step: int) -> None:
        """Nothing to do: no randomness here."""

    @torch.no_grad()
    def write(self) -> None:
        """After each update: no vector longer than the limit."""
        longest = self.limit * self.model.d_model**0.5
        for tensor in self.bounded:
            tensor.mul_((longest / tensor.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0))


class Prepended(Soft):
    """Vectors in the place of placeholder tokens, which `insert` puts into the prompts; they start as random tokens."""

    column = 0  # where the placeholders are

    def start(self, every: torch.Tensor) -> list[torch.Tensor]:
        rows = torch.randint(len(every), (self.size,), generator=self.generator)
        return [every[rows.to(every.device)].clone()]

    def act(self, embedded: torch.Tensor) -> torch.Tensor:
        vectors = (self.unit * self.tensors[0]).to(embedded).expand(len(embedded), -1, -1)
        return torch.cat([embedded[:, :self.column], vectors, embedded[:, self.column + self.size:]], dim=1)


class Attention(Soft):
    """One head of attention from every token to learned keys and values."""

    def start(self, every: torch.Tensor) -> list[torch.Tensor]:
        d = every.shape[1]
        query, keys = (torch.randn(n, d, generator=self.generator) for n in (d, self.size))
        return [keys, torch.zeros(self.size, d), query / d**0.5]

    @property
    def bounded(self) -> list[torch.Tensor]:
        return self.tensors[:2]

    def act(self, embedded: torch.Tensor) -> torch.Tensor:
        keys, values, query = self.tensors
        scores = (embedded.float() / self.unit) @ query.T @ keys.T / keys.shape[1]**0.5
        return embedded + (self.unit * (scores.softmax(-1) @ values)).to(embedded.dtype)


KINDS = {"prompt": Prepended, "attention": Attention}


def soft_prompt(model: Model, edit: Edit | None, split: Split, *, kind: str = "prompt", size: int = 10, restarts: int = 1,
                steps: Sequence[int] = (0, 60), settings: Settings = SETTINGS, limit: float = 1.0, n_retain: int = 100,
                n_forget: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Attack `soft prompt` or `soft attention`: one setting a restart and number of steps.

    `settings` decides about learning rate, batch, `retain_weight` (0 trains without the second term) and `format`, on which the
    model is also read. Groups: `forget` (`attack_test`), `shown` (`attack_train`), `retain`. Further columns: `restart`, `step`.
    Raises `AttackError` for a split without two halves or a quantised model.
    """
    if kind not in KINDS:
        raise AttackError(f"soft prompt: kind={kind!r}; there are {', '.join(KINDS)}")
    if not steps or min(steps) < 0 or restarts < 1:
        raise AttackError(f"soft prompt: steps {tuple(steps)}, {restarts} restarts; one of each is needed")
    check_trainable(model, f"soft {kind}")
    check_halves(split)
    groups = asked_after(split, split.attack_train, n_retain, n_forget)
    settings = replace(settings, steps=max(1, *steps), cache=False)
    tables = []
    with applied(model, edit):
        for restart in range(restarts):
            soft = KINDS[kind](model, size, limit, seed * 1_000_003 + restart)
            for step, rows in _train(model, soft, split, groups, settings, steps, seed + restart):
                setting = f"{size} vectors, restart {restart}, step {step} of {settings.steps}"
                tables.append(tidy(rows, f"soft {kind}", setting, restart=restart, step=step))
    return pd.concat(tables, ignore_index=True)


def insert(prompts: PromptSet, size: int, column: int) -> PromptSet:
    """The prompts with `size` placeholder tokens at a column before the subject; padding must be on the right."""
    n = len(prompts)
    wide = lambda tensor, fill: torch.cat([tensor[:, :column], fill.expand(n, size), tensor[:, column:]], dim=1)
    return replace(prompts, tokens=wide(prompts.tokens, prompts.tokens[:1, :1]), mask=wide(prompts.mask, prompts.mask[:1, :1]),
                   last=prompts.last + size, subject=prompts.subject + size)


def _train(model: Model, soft: Soft, split: Split, groups: dict[str, Facts], settings: Settings, steps: Sequence[int],
           seed: int) -> list[tuple[int, pd.DataFrame]]:
    """(step, rows of all groups) of one training."""
    def ready(facts: Facts) -> PromptSet:
        prompts = questions(model, facts, split, settings.format)
        if not isinstance(soft, Prepended):
            return prompts
        soft.column = int(bool((prompts.tokens[:, 0] == model.tokenizer.bos_token_id).all()))
        return insert(prompts, soft.size, soft.column)

    asked, found, terms = {name: ready(facts) for name, facts in groups.items()}, [], []
    lessons = {"forget": (1.0, split.attack_train), "retain": (settings.retain_weight, split.retain_train)}
    for name, (weight, facts) in lessons.items():
        if weight:
            prompts = ready(facts)
            targets = Targets(prompts.answer_ids, prompts.edit_ids)
            drawn = draws(len(prompts), settings.batch, settings.steps, seed, name)
            terms.append(answer_term(model, name, weight, prompts, Relearn(), targets, drawn))

    def watch(step: int) -> dict[str, float]:
        if step in steps:
            tables = [with_readings(metrics.scores(metrics.last_logits(model, prompts), prompts), groups[name]).assign(group=name)
                      for name, prompts in asked.items()]
            found.append((step, pd.concat(tables)))
        return {}

    with soft:
        if max(steps):
            train(model, soft, terms, settings, "soft prompt", watch=watch)
        else:
            watch(0)
    return found
