"""The terms of a training loss: token sequences, which of them each step draws, and the loss of each row."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from helpers.chunks import over_rows
from helpers.models import Model
from helpers.prompts import PromptSet
from helpers.unlearning.forward import hidden_states, logits_of
from helpers.unlearning.objectives import RMU, Objective, Relearn, Targets


@dataclass(frozen=True, eq=False)
class Sequences:
    """n token sequences, padded on the right: tokens and mask (n, length), on the CPU."""

    tokens: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of_texts(cls, tokenizer, texts: Sequence[str], length: int) -> Sequences:
        """The first `length` tokens of each text. Texts of fewer than two tokens predict nothing and are left out."""
        rows = [torch.tensor(ids[:length]) for ids in tokenizer(list(texts))["input_ids"] if len(ids) > 1]
        pad = torch.nn.utils.rnn.pad_sequence
        return cls(pad(rows, batch_first=True), pad([torch.ones_like(row) for row in rows], batch_first=True))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> torch.Tensor:
        return self.mask.sum(1)

    @property
    def common_start(self) -> int:
        """How many tokens all rows begin with; at least one token of each row is left over."""
        same = (self.tokens == self.tokens[0]).all(0).int().cumprod(0).sum()
        return min(int(same), int(self.lengths.min()) - 1)

    def batch(self, rows: torch.Tensor, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask of some rows, cut to the longest of them."""
        width = int(self.lengths[rows].max())
        return self.tokens[rows, :width].to(device), self.mask[rows, :width].to(device)


@dataclass(frozen=True, eq=False)
class Term:
    """One term of the loss.

    `loss(hidden, mask, rows)` maps hidden states (b, length, d_model) to one loss a row; rows are averaged with
    weights `size` (1 for a prompt; for a text its number of predicted tokens, so that tokens count alike).
    `stop`: the hidden states are the residual before that block; None: those that are unembedded.
    `draws` holds for each step the distinct rows drawn and how often each. Of the first `shared` tokens, the same
    in every row, the loss needs no hidden states: `hidden` may come without them.
    """

    name: str
    weight: float
    sequences: Sequences
    size: torch.Tensor
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    draws: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    stop: int | None = None
    shared: int = 0

    @property
    def used(self) -> torch.Tensor:
        """Every row that some step draws, in order."""
        return torch.cat([rows for rows, _ in self.draws]).unique()

    @property
    def repeats(self) -> float:
        """How often a row is used, on average."""
        return sum(len(rows) for rows, _ in self.draws) / len(self.used)


class Residuals:
    """The residual before block `layer`, computed once for the rows that training comes back to."""

    @torch.no_grad()
    def __init__(self, model: Model, sequences: Sequences, rows: torch.Tensor, layer: int, chunk: int):
        self.place = torch.full((len(sequences),), -1)
        # in order of length, so that little is spent on padding; always in the same groups, so that a resumed run repeats the bits
        rows = rows[sequences.lengths[rows].argsort(stable=True)]
        self.place[rows] = torch.arange(len(rows))
        width = int(sequences.lengths[rows].max())
        self.values = torch.zeros(len(rows), width, model.d_model, dtype=model.dtype, device=model.device)

        def fill(places: torch.Tensor) -> None:
            tokens, mask = sequences.batch(rows[places], model.device)
            found = hidden_states(model, tokens, mask, stop=layer)
            self.values[places, :found.shape[1]] = found.to(self.values)

        over_rows(fill, len(rows), chunk)

    def at(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        return self.values[self.place[rows].to(self.values.device), :width]


def draws(n: int, batch: int, steps: int, seed: int, name: str) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """For each step `batch` rows out of n, from one shuffled pass after the other: distinct rows, and how often each.

    With fewer rows than the batch holds a row comes several times a step; it is computed once and counted so often.
    """
    generator = torch.Generator().manual_seed(random.Random(f"{seed}-{name}").randrange(2**62))
    passes = -(-batch * steps // n)
    stream = torch.cat([torch.randperm(n, generator=generator) for _ in range(passes)])[:batch * steps]
    return tuple(tuple(rows.unique(return_counts=True)) for rows in stream.split(batch))


def answer_term(model: Model, name: str, weight: float, prompts: PromptSet, objective: Objective, targets: Targets, drawn) -> Term:
    """A loss on the answer to a prompt; only the last position of each row is unembedded."""
    sequences = Sequences(prompts.tokens, prompts.mask)

    def loss(hidden: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        missing = mask.shape[1] - hidden.shape[1]
        # where a model is spread over devices, its last block may be on another one than the tokens
        last = hidden[torch.arange(len(rows), device=hidden.device), mask.sum(1).to(hidden.device) - 1 - missing]
        logits = logits_of(model, last)
        return objective.loss(logits, targets[rows].to(logits.device))

    return Term(name, weight, sequences, torch.ones(len(sequences)), loss, drawn, shared=sequences.common_start)


def text_term(model: Model, weight: float, sequences: Sequences, drawn) -> Term:
    """Next-token cross-entropy, averaged over tokens."""

    def loss(hidden: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        tokens, _ = sequences.batch(rows, hidden.device)
        real = mask[:, 1:].bool().to(hidden.device)
        each = F.cross_entropy(logits_of(model, hidden[:, :-1][real]), tokens[:, 1:][real], reduction="none")
        return torch.zeros(real.shape, dtype=each.dtype, device=each.device).masked_scatter(real, each).sum(1) / real.sum(1)

    return Term("text", weight, sequences, sequences.lengths.float() - 1, loss, drawn)


def rmu_terms(model: Model, objective: RMU, terms: Sequence[Term], layer: int, seed: int, chunk: int) -> list[Term]:
    """The same rows, weights and draws with RMU's losses on the residual after `layer`.

    What all forget prompts begin with is not steered: it is about none of these facts, retain prompts begin with it
    too, and the first token's residual is often many times as long as any other, so that it would drown the rest.
    """
    u = objective.direction(model.d_model, seed)
    changed = []
    for term in terms:
        base = Residuals(model, term.sequences, term.used, layer + 1, chunk)

        def loss(hidden, mask, rows, base=base, start=term.shared, forget=term.name == "forget"):
            before = base.at(rows, hidden.shape[1]).to(hidden.device)
            if forget:
                return objective.forget(hidden[:, start:], before[:, start:], mask[:, start:], u.to(hidden))
            return objective.keep(hidden, before, mask)

        changed.append(Term(term.name, term.weight, term.sequences, torch.ones(len(term.sequences)), loss, term.draws, layer + 1))
    return changed


@torch.no_grad()
def reference_log_p(model: Model, prompts: PromptSet, chunk: int) -> torch.Tensor:
    """(n,) log p(true answer) of the model as it is now."""
    term = answer_term(model, "reference", 1.0, prompts, Relearn(), Targets(prompts.answer_ids, prompts.edit_ids), ())

    def log_p(rows: torch.Tensor) -> torch.Tensor:
        tokens, mask = term.sequences.batch(rows, model.device)
        return -term.loss(hidden_states(model, tokens, mask), mask, rows).cpu()

    return torch.cat(over_rows(log_p, len(prompts), chunk))
