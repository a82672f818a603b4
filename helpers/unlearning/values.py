"""New values for facts, as ROME, MEMIT and AlphaEdit write them: what to add to the output of `down` at the subject.

    requests = ask(model, split, split.forget, texts, Values())
    delta, table = optimise(model, requests, layer=3, size=..., values=Values())

For each fact, δ is found by gradient descent; added at the subject's last token in every context, it minimises

    −log p(edit answer | prompt)  +  essence · KL(p(· | "{subject} is a") ‖ the same before)  +  decay · ‖δ‖ / size

as published, but for this: step, decay and clamp are relative to the residual δ is added to (MEMIT's clamp is;
ROME's, relative to the MLP's output, is too tight where many layers share a fact, and the published steps are numbers
that fit one model); the essence term is read at the end of its prompt, as the paper says, where the code reads it at
the subject; contexts (what stands before the prompt) are the openings of given texts, where the code generates them.

δ sits on the output of `down`. Under a post-norm (Gemma2) it passes that norm on its way to the residual, in the
optimisation as in the edited model, and the norm bounds what one layer can write. So MEMIT and AlphaEdit, which share
a value among layers, put δ `behind` the norm, on the residual itself (MEMIT's own definition; without a post-norm the
same). Biases stay as they are. Parallel blocks (GPT-NeoX) need nothing special: their MLP
adds its output to the residual, too.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch.nn import functional as F

from helpers import prompts as formats
from helpers.chunks import over_rows
from helpers.facts import Facts
from helpers.models import Model
from helpers.prompts import Prompt, tokenize
from helpers.splits import Split
from helpers.unlearning.covariances import reading
from helpers.unlearning.edit import EditError
from helpers.unlearning.finetune import check_facts
from helpers.unlearning.forward import hidden_states, logits_of
from helpers.unlearning.terms import Sequences

FORMATS = ("cloze", "one_shot", "few_shot", "qa", "paraphrase")  # formats whose answer is the fact's
NOTHING = -100  # no answer is predicted at this position


@dataclass(frozen=True)
class Values:
    """How a new value is found: Adam on δ, `rate` and `clamp` (its greatest length) in units of `sizes`.

    `enough`: a fact whose loss is below this is left. `format`: the prompts that are edited; `contexts`: how many
    openings of texts come before it, beside none at all.
    """

    steps: int = 20
    rate: float = 0.1
    decay: float = 0.05
    clamp: float = 1.0
    essence: float = 0.0625
    enough: float = 0.05
    format: str = "one_shot"
    contexts: int = 5


@dataclass(frozen=True, eq=False)
class Requests:
    """What is to be written: for each fact the prompts in all contexts, followed by its answer, and one essence prompt.

    All are (n, c + 1, …), the essence prompt last: `tokens` and `mask` (…, length), `labels` (…, length) the answer's
    tokens where they are predicted, `subject` and `last` (…) the positions of the subject's and the prompt's last
    token.
    """

    facts: Facts
    tokens: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    subject: torch.Tensor
    last: torch.Tensor

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, rows: torch.Tensor) -> Requests:
        parts = {name: getattr(self, name)[rows] for name in ("tokens", "mask", "labels", "subject", "last")}
        return Requests(self.facts[rows], **parts)

    def batch(self, device) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows flat, cut to the longest: tokens and mask (n · (c + 1), length)."""
        flat = Sequences(self.tokens.flatten(0, 1), self.mask.flatten(0, 1))
        return flat.batch(torch.arange(len(flat)), device)


def ask(model: Model, split: Split, facts: Facts, texts: Sequence[str], values: Values, seed: int = 0) -> Requests:
    """The prompts for these facts. Solved examples come from the retain set, as in fine-tuning."""
    check_facts(facts, split)
    if values.format not in FORMATS:
        raise EditError(f"format {values.format!r}: facts are written into one of {', '.join(FORMATS)}")
    make = formats.FORMATS[values.format]
    bare = make(facts, **({"pool": split.retain_train} if "pool" in inspect.signature(make).parameters else {}))
    essence = [Prompt(p.fact, f"{p.subject} is a", 0, p.subject, p.options) for p in bare]
    openings = ["", *_openings(texts, values.contexts, seed)]
    rows = [replace(p, text=o + p.text, start=len(o) + p.start) for p in bare for o in openings] + essence
    asked = tokenize(model.tokenizer, rows)
    n, c = len(bare), len(openings)
    answers = [() if row >= n * c else asked.option_tokens[row][1] for row in range(len(rows))]
    width = asked.tokens.shape[1] + max(map(len, answers)) - 1
    tokens, mask_ = (F.pad(t, (0, width - asked.tokens.shape[1])) for t in (asked.tokens, asked.mask))
    labels = torch.full_like(tokens, NOTHING)
    for row, answer in enumerate(answers):
        if answer:
            end = int(asked.last[row]) + 1
            labels[row, end - 1: end - 1 + len(answer)] = torch.tensor(answer)
            tokens[row, end: end - 1 + len(answer)] = torch.tensor(answer[:-1])
            mask_[row, end: end - 1 + len(answer)] = 1
    shaped = lambda t: torch.cat([t[:n * c].unflatten(0, (n, c)), t[n * c:, None]], dim=1)
    return Requests(facts, *map(shaped, (tokens, mask_, labels, asked.subject[:, 1] - 1, asked.last)))


def _openings(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """The first five to ten words of some texts, as sentences to stand before a prompt."""
    rng = random.Random(f"contexts-{seed}")
    if count > len(texts):
        raise EditError(f"{count} contexts are to be cut from {len(texts)} texts: give more texts, or fewer contexts")
    return [" ".join(text.split()[:rng.randint(5, 10)]).rstrip(".") + ". " for text in rng.sample(list(texts), count)]


@torch.no_grad()
def mean_keys(model: Model, requests: Requests, layer: int, top: int | None = None, delta: torch.Tensor | None = None,
              behind: bool = False, batch_size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """What `down` reads at `layer` (n, d_mlp), and the residual after block `top` (n, d_model), at the subject's last
    token, each averaged over a fact's contexts, in float64. `delta` (n, d_model) is added at `top`, see `adding`."""
    top = layer if top is None else top

    def work(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        part = requests[rows]
        tokens, mask_ = part.batch(model.device)
        with reading(model, [layer]) as seen, adding(model, top, part, None if delta is None else delta[rows], behind):
            after = hidden_states(model, tokens, mask_, stop=top + 1)
        return tuple(_at(x, part.subject)[:, :-1].double().mean(1) for x in (seen[layer], after))

    keys, after = zip(*over_rows(work, len(requests), batch_size))
    return torch.cat(keys), torch.cat(after)


@torch.no_grad()
def sizes(model: Model, requests: Requests, layer: int, behind: bool = False) -> torch.Tensor:
    """(n,) what the length of a fact's δ is measured in: the length of the residual after the block, at the subject.
    Before a post-norm four times that of the output of `down` (ROME's clamp), since of that the norm leaves no more
    than the direction."""
    keys, residual = mean_keys(model, requests, layer)
    if behind or model.mlp_post_norm(layer) is None:
        return residual.norm(dim=1)
    return 4 * (keys @ model.matrix("down", layer)[0].double().T).norm(dim=1)


def optimise(model: Model, requests: Requests, layer: int, size: torch.Tensor, values: Values,
             behind: bool = False, batch_size: int = 16) -> tuple[torch.Tensor, pd.DataFrame]:
    """δ (n, d_model) for the output of `down` at a layer, or `behind` a norm that follows it, and how it went; facts do not influence each other.

    `size` (n,) is what the length of δ is measured in. One row a fact: `steps`, `loss_before` and `loss_after` (nats
    of the answer, without the other terms), `essence` (KL, nats), `length` of δ relative to `size`. Raises
    `EditError` for a loss that is no finite number.
    """
    work = lambda rows: _optimise(model, requests[rows], layer, size[rows], values, behind)
    parts = over_rows(work, len(requests), batch_size)
    return torch.cat([delta for delta, _ in parts]), pd.concat([table for _, table in parts], ignore_index=True)


def _optimise(model: Model, requests: Requests, layer: int, size: torch.Tensor,
              values: Values, behind: bool) -> tuple[torch.Tensor, pd.DataFrame]:
    tokens, mask_ = requests.batch(model.device)
    with torch.no_grad():
        before = hidden_states(model, tokens, mask_, stop=layer)
    size = size.to(before.device, torch.float32)
    free = torch.zeros(len(requests), model.d_model, device=before.device, requires_grad=True)
    unit = (size / model.d_model**0.5)[:, None]
    optimizer = torch.optim.Adam([free], lr=values.rate)
    going = torch.ones(len(requests), dtype=torch.bool, device=free.device)
    taken, first, reference = torch.zeros(len(requests), dtype=torch.int64), None, None
    for step in range(values.steps + 1):
        optimizer.zero_grad()
        with torch.set_grad_enabled(step < values.steps), adding(model, layer, requests, free * unit, behind):
            hidden = hidden_states(model, tokens, mask_, layer, before)
            answer, said = _losses(model, requests, hidden)
            reference = said.detach() if reference is None else reference
            essence = (said.exp() * (said - reference)).sum(-1)
            length = (free * unit).norm(dim=-1) / size
            loss = answer + values.essence * essence + values.decay * length
        if not loss[going].isfinite().all():
            fact = requests.facts[int((going & ~loss.isfinite()).nonzero()[0])]
            raise EditError(f"{fact.subject!r}: the loss of its new value is not a finite number at step {step}; "
                            "nothing was changed")
        first = answer.detach().clone() if first is None else first
        going &= loss > values.enough
        if step == values.steps or not going.any():
            break
        loss[going].sum().backward()
        held = free.detach().clone()
        optimizer.step()
        with torch.no_grad():
            free[~going] = held[~going]
            free *= (values.clamp * size / (free * unit).norm(dim=-1).clamp(min=1e-12)).clamp(max=1.0)[:, None]
        taken += going.cpu()
    table = {"subject": [f.subject for f in requests.facts], "steps": taken.tolist(), "loss_before": first.tolist(),
             "loss_after": answer.tolist(), "essence": essence.tolist(), "length": length.tolist()}
    return (free * unit).detach().double(), pd.DataFrame(table)


def _losses(model: Model, requests: Requests, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of each fact's answer, a mean over tokens and contexts (n,); log-probabilities after its essence prompt
    (n, vocab)."""
    labels = requests.labels[..., :hidden.shape[1]].to(hidden.device)
    wanted = labels != NOTHING
    each = F.cross_entropy(logits_of(model, hidden[wanted.flatten(0, 1)]), labels[wanted], reduction="none")
    summed = torch.zeros(labels.shape, dtype=each.dtype, device=each.device).masked_scatter(wanted, each).sum((1, 2))
    essence = _at(hidden, requests.last)[:, -1]
    return summed / wanted.sum((1, 2)), logits_of(model, essence).log_softmax(-1)


def _at(activation: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(n, c + 1, features) at one position a row, out of (n · (c + 1), length, features)."""
    rows = torch.arange(len(activation), device=activation.device)
    return activation[rows, positions.flatten().to(activation.device)].unflatten(0, positions.shape)


@contextmanager
def adding(model: Model, layer: int, requests: Requests, delta: torch.Tensor | None, behind: bool = False) -> Iterator[None]:
    """Within the block, `down` at a layer, or what is `behind` it where a norm follows, gives δ (n, d_model) more at each
    subject's last token, in all rows of a fact."""
    def add(_, __, output: torch.Tensor) -> torch.Tensor:
        place = torch.arange(len(output), device=output.device), requests.subject.flatten().to(output.device)
        more = delta.repeat_interleave(requests.subject.shape[1], 0)
        return output.index_put(place, more.to(output), accumulate=True)

    last = (behind and model.mlp_post_norm(layer)) or model.part("down", layer)
    hook = None if delta is None else last.register_forward_hook(add)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
