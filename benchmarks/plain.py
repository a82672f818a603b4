"""The edit that `helpers.unlearning.finetune` makes, by transformers and torch.optim without more.

Whole passes with all logits, gradients and optimizer state for every parameter, transformers' default attention. Shared with
`finetune` are the examples and which of them each step draws, the three loss terms, the learning rates, and the fused AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from helpers.models import Model
from helpers.splits import Split
from helpers.unlearning.finetune import questions
from helpers.unlearning.terms import Sequences, draws
from helpers.unlearning.training import Settings


def train(model: Model, split: Split, texts: Sequence[str], settings: Settings, names: Sequence[str] | None = None, seed: int = 0) -> None:
    """Make the edit in place: train all parameters, or those with these names."""
    hf, device = model.hf, model.device
    parameters = list(hf.parameters()) if names is None else [hf.get_parameter(name) for name in names]
    hf.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    examples = _examples(model, split, texts, settings, seed)
    for step in range(settings.steps):
        optimizer.zero_grad()
        for sequences, answers, weight, drawn in examples:
            distinct, counts = drawn[step]
            rows = distinct.repeat_interleave(counts)
            predicted = len(rows) if answers is not None else int((sequences.lengths[rows] - 1).sum())
            for part in rows.split(settings.chunk):
                tokens, mask = sequences.batch(part, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
                    logits = hf(input_ids=tokens, attention_mask=mask, use_cache=False).logits
                if answers is None:
                    labels = tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100).flatten()
                    logits = logits[:, :-1].flatten(0, 1)
                else:
                    labels = answers[part].to(device)
                    logits = logits[torch.arange(len(part), device=device), mask.sum(1) - 1]
                wide = torch.promote_types(logits.dtype, torch.float32)
                loss = F.cross_entropy(logits.to(wide), labels, reduction="sum")
                (weight * loss / predicted).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        schedule.step()


@contextmanager
def lent(model: Model) -> Iterator[None]:
    """Within the block the model has the attention that transformers takes by default; after it, weights and all are as before."""
    before = {name: p.detach().to("cpu", copy=True) for name, p in model.hf.named_parameters()}
    if model.attn_softcap is None:  # which fused attention does not know
        model.hf.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.hf.set_attn_implementation("eager")
        model.hf.requires_grad_(False)
        for name, parameter in model.hf.named_parameters():
            parameter.grad = None
            parameter.copy_(before[name])


def _examples(model: Model, split: Split, texts: Sequence[str], settings: Settings, seed: int) -> list[tuple]:
    """(sequences, answer ids or None for text, weight, rows drawn by step) of each term."""
    forget, retain = (questions(model, facts, split, settings.format) for facts in (split.forget, split.retain_train))
    terms = {"forget": (Sequences(forget.tokens, forget.mask), forget.edit_ids, settings.forget_weight),
             "retain": (Sequences(retain.tokens, retain.mask), retain.answer_ids, settings.retain_weight),
             "text": (Sequences.of_texts(model.tokenizer, texts, settings.text_tokens), None, settings.text_weight)}
    return [(*term, draws(len(term[0]), settings.batch, settings.steps, seed, name)) for name, term in terms.items()]
