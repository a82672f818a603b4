"""What a number means: scores of a model on prompts, as tidy rows per fact.

Both readings are always given: the paper's *mean probability* (over the full vocabulary, and
restricted to the options: the four sports, the four letters) and plain *top-1 accuracy*.
Chance is 1/k for k options; the majority class of a set of facts is the fairer floor.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch.nn import functional as F

from helpers import prompts as formats
from helpers.facts import Facts
from helpers.models import Model
from helpers.prompts import PromptSet


@torch.no_grad()
def last_logits(model: Model, prompts: PromptSet, batch_size: int = 256) -> torch.Tensor:
    """(n, vocab) fp32 logits at the last real token, on the CPU. Only that position is unembedded."""
    rows = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start:start + batch_size].to(model.device)
        rows.append(model.hf(input_ids=batch.tokens, attention_mask=batch.mask, position_ids=batch.position_ids,
                             use_cache=False, logits_to_keep=_from_first(batch.last)).logits[
                                 torch.arange(len(batch)), batch.last - batch.last.min()].float().cpu())
    return torch.cat(rows)


@torch.no_grad()
def answer_logprobs(model: Model, prompts: PromptSet, batch_size: int = 256) -> torch.Tensor:
    """(n, k) log-probability in nats of each whole option after its prompt; -inf where an option is absent."""
    n, k = len(prompts), max(map(len, prompts.option_tokens))
    jobs = [(i, j, option) for i, row in enumerate(prompts.option_tokens) for j, option in enumerate(row)]
    result = torch.full((n, k), float("-inf"))
    pad = int(prompts.tokens[0, 0])  # any token will do: padding is masked and to the right
    for start in range(0, len(jobs), batch_size):
        part = jobs[start:start + batch_size]
        texts = [prompts.tokens[i][prompts.mask[i].bool()].tolist() for i, _, _ in part]
        length = max(len(t) + len(o) for t, (_, _, o) in zip(texts, part))
        tokens = torch.full((len(part), length), pad)
        mask = torch.zeros_like(tokens)
        for row, (text, (_, _, option)) in enumerate(zip(texts, part)):
            tokens[row, :len(text) + len(option)] = torch.tensor([*text, *option])
            mask[row, :len(text) + len(option)] = 1
        logits = model.hf(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        logp = logits.float().log_softmax(-1).cpu()
        for row, (text, (i, j, option)) in enumerate(zip(texts, part)):
            where = torch.arange(len(text) - 1, len(text) + len(option) - 1)
            result[i, j] = logp[row, where, torch.tensor(option)].sum()
    return result


def scores(logits: torch.Tensor, prompts: PromptSet) -> pd.DataFrame:
    """One row a prompt from (n, vocab) last-token logits.

    p_true, p_edit   probability of the first answer token over the full vocabulary
    q_true, q_edit   the same, restricted to the prompt's options
    top_true, top_edit     1.0 where that answer is the argmax of the full vocabulary
    pick_true, pick_edit   1.0 where it alone is the argmax among the options (a tie or a NaN counts for neither)
    """
    p = logits.softmax(-1)
    rows = torch.arange(len(prompts))
    ids = prompts.option_ids
    among = logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, float("-inf"))
    best = logits.argmax(-1)
    return _table(prompts, among, {"p_true": p[rows, ids[:, 0]], "p_edit": p[rows, ids[:, 1]],
                                   "top_true": best == ids[:, 0], "top_edit": best == ids[:, 1]})


def ask(model: Model, facts: Facts, format: str, batch_size: int = 256, **options) -> pd.DataFrame:
    """Put facts to a model in one format; `scores` per prompt. Dashed answers are scored whole (no p, no top)."""
    prompts = formats.build(model.tokenizer, facts, format, **options)
    if prompts.whole:
        return _table(prompts, answer_logprobs(model, prompts, batch_size), {})
    return scores(last_logits(model, prompts, batch_size), prompts)


def ask_mcq(model: Model, facts: Facts, orders: Sequence[int] = formats.LATIN_SQUARE, batch_size: int = 256) -> pd.DataFrame:
    """MCQ averaged per fact over option orders (the balanced Latin square of 4 by default, all 24 on request)."""
    tables = [ask(model, facts, "mcq", batch_size, order=o) for o in orders]
    keys = ["subject", "relation", "answer", "edit", "format"]
    return pd.concat(tables).groupby(keys, sort=False, as_index=False).mean(numeric_only=True)


def top_tokens(model: Model, prompts: PromptSet, k: int = 5) -> pd.DataFrame:
    """The k likeliest next tokens of the first prompt: columns ``token``, ``p``."""
    p, ids = last_logits(model, prompts[:1]).softmax(-1)[0].topk(k)
    return pd.DataFrame({"token": [model.tokenizer.decode([i]) for i in ids.tolist()], "p": p.tolist()}).round(3)


def known(model: Model, facts: Facts, threshold: float = 0.5) -> Facts:
    """The facts the model knows: full-vocabulary p(true) on the one-shot prompt of at least ``threshold`` (spec section 1.3).

    Facts that cannot be asked so of this model are left out with a warning, see `prompts.askable`.
    """
    asked = formats.askable(model.tokenizer, facts, "one_shot", pool=facts)
    if len(asked) < len(facts):
        warnings.warn(f"{len(facts) - len(asked)} of {len(facts)} facts cannot be asked of {model.name} and are left out: their answers "
                      "share the first token, or their relation has no other case for an example", stacklevel=2)
    p = ask(model, asked, "one_shot", pool=facts)["p_true"].to_numpy()
    return asked[[i for i in range(len(asked)) if p[i] >= threshold]]


@torch.no_grad()
def text_loss(model: Model, texts: Iterable[str], batch_size: int = 64) -> float:
    """Mean next-token loss in nats over all tokens of the texts: what an edit does to everything else."""
    texts, total, count = list(texts), 0.0, 0
    for start in range(0, len(texts), batch_size):
        encoded = model.tokenizer(texts[start:start + batch_size])["input_ids"]
        rows = [torch.tensor(ids) for ids in encoded if len(ids) > 1]
        if not rows:
            continue
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True).to(model.device)
        logits = model.hf(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        labels = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    if not count:
        raise ValueError("no text with at least two tokens: there is no next token to predict")
    return total / count


def _table(prompts: PromptSet, among: torch.Tensor, columns: dict[str, torch.Tensor]) -> pd.DataFrame:
    q = among.softmax(-1)
    # Compared with the others instead of by argmax, which gives ties (common in bf16) and NaNs to the first, true option.
    best_other = [among[:, [k for k in range(among.shape[1]) if k != j]].amax(1) for j in (0, 1)]
    columns = {**columns, "q_true": q[:, 0], "q_edit": q[:, 1],
               "pick_true": among[:, 0] > best_other[0], "pick_edit": among[:, 1] > best_other[1]}
    facts = {"subject": [f.subject for f in prompts.facts], "relation": [f.relation.name for f in prompts.facts],
             "answer": [f.answer for f in prompts.facts], "edit": [f.edit for f in prompts.facts], "format": prompts.format}
    return pd.DataFrame(facts | {name: value.double().numpy() for name, value in columns.items()})


def _from_first(last: torch.Tensor) -> torch.Tensor:
    """Positions whose logits are needed: from the earliest last token to the latest."""
    return torch.arange(int(last.min()), int(last.max()) + 1, device=last.device)
