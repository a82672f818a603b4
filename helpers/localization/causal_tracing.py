"""Causal tracing: with the subject made unreadable by noise, what brings the answer back?

Noise of standard deviation 3σ is added to the embeddings of the subject's tokens, and one component, or
a window of layers, is put back to its value in the clean run (arXiv 2202.05262; spec section 3). σ is the
standard deviation of what the embedding *module* puts out for these tokens, so it includes the factor by
which Gemma scales; the reference code's √(3σ) and its sum over the batch are not copied.

    score   = (LD_restored − LD_noised) / (LD_clean − LD_noised),   LD = logit(true) − logit(edit answer)
    p_score = the same of the probability of the true answer

with LD and p averaged over several noise samples for each fact. In the tables the noised run is called
`corrupt` and the restored one `patched`, as everywhere in `helpers.localization`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pandas as pd
import torch

from helpers.chunks import over_prompts
from helpers.localization.engine import Run, flush_right
from helpers.localization.patching import Unit, by_distance, every, sweep, tidy
from helpers.localization.positions import choose
from helpers.localization.recovery import add_scores, describe, measure
from helpers.models import Model
from helpers.prompts import PromptSet
from helpers.sites import Batch

KINDS = {"attn": "attn_out", "mlp": "mlp_out", "head": "head"}


def trace_positions(
    model: Model,
    prompts: PromptSet,
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    positions: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    window: int = 1,
    samples: int = 3,
    noise: float = 3.0,
    seed: int = 0,
    after: int = 3,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Restore every site × layer × position role, one at a time: the picture.

    `window` attentions or MLPs around each layer are restored together (ROME takes 10 of 48 layers); the
    residual needs no window, one layer of it holds everything. `positions`, `after` and the columns are
    those of `patching.patch`, without `counterfactual` and with `window` and `samples`; a window has no
    `component`. Noise is drawn for each prompt and sample on its own, so it depends on `seed` and the
    prompt, not on batch size or company. Raises `ValueError` for noise, samples or window out of range, and
    what `patch` raises.
    """
    if window < 1:
        raise ValueError(f"window {window}: at least one layer has to be restored")
    units = list(every(model, sites, choose(prompts, positions, after), layers, window))
    table = _trace(model, prompts, units, samples, noise, seed, after, batch_size)
    return table.assign(window=table["site"].map(lambda site: 1 if site == "resid_pre" else window))


def trace_components(
    model: Model,
    prompts: PromptSet,
    kinds: Sequence[str] = ("attn", "head", "mlp"),
    layers: Sequence[int] | None = None,
    samples: int = 3,
    noise: float = 3.0,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Restore every attention, head and MLP at *all* positions: the score for selection (spec section 3).

    Columns and errors as in `trace_positions`; `position` is `all` throughout.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"kinds {unknown}: allowed are {', '.join(KINDS)}")
    units = list(every(model, [KINDS[kind] for kind in kinds], ["all"], layers))
    return _trace(model, prompts, units, samples, noise, seed, 0, batch_size)


def noise_scale(model: Model, prompts: PromptSet) -> float:
    """σ: standard deviation of the embedding module's output over the subject tokens of these prompts."""
    batch = Batch.of(prompts)
    tokens = batch.tokens[batch.at("subject")]
    with torch.no_grad():
        return float(model.embed(tokens.to(model.device)).cpu().double().std())


def subject_noise(prompts: PromptSet, width: int, seed: int, sample: int = 0) -> torch.Tensor:
    """What one sample adds to the embeddings, in units of its scale: (n, length, width), flush right, 0 off the subject."""
    about = [f"{fact.subject}|{fact.relation.name}|{text}" for fact, text in zip(prompts.facts, prompts.texts)]
    return _noise(flush_right(prompts), width, [f"{seed}|{sample}|{name}" for name in about])


def _trace(
    model: Model,
    prompts: PromptSet,
    units: Sequence[Unit],
    samples: int,
    noise: float,
    seed: int,
    after: int,
    batch_size: int,
) -> pd.DataFrame:
    if samples < 1 or noise <= 0:
        raise ValueError(f"samples {samples}, noise {noise}: at least one sample of noise above 0 is needed")
    scale = noise * noise_scale(model, prompts)
    kept = sorted({unit.site for unit in units} - {"resid_pre"})
    answers = prompts.option_ids[:, :2]

    def work(rows: torch.Tensor) -> pd.DataFrame:
        part = prompts[rows]
        batch = flush_right(part)
        clean = Run(model, batch, kept)
        embeds, tables = clean["embed", 0], []
        for sample in range(samples):
            draw = subject_noise(part, embeds.shape[-1], seed, sample)
            noised = Run(model, batch, embeds=embeds + (scale * draw).to(embeds))
            table = sweep(noised, clean, units, answers[rows], after, rows)
            for name, values in measure(noised.logits, answers[rows]).items():
                table[f"{name}_corrupt"] = values.numpy()[table["at"]]
            tables.append(table)
        table = pd.concat(tables).groupby(["unit", "row", "at"], as_index=False).mean()
        for name, values in measure(clean.logits, answers[rows]).items():
            table[f"{name}_clean"] = values.numpy()[table["at"]]
        return table

    tables = over_prompts(work, model, prompts, batch_size, by_distance(prompts))
    return add_scores(tidy(tables, units, describe(prompts))).assign(samples=samples)


def _noise(batch: Batch, width: int, seeds: Sequence[str]) -> torch.Tensor:
    """Standard normal (n, length, width) on the subject's tokens, 0 elsewhere; row i depends on `seeds[i]` alone."""
    noise = torch.zeros(*batch.tokens.shape, width)
    for row, (text, where) in enumerate(zip(seeds, batch.at("subject"))):
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)
        generator = torch.Generator().manual_seed(number)
        noise[row, where] = torch.randn(int(where.sum()), width, generator=generator)
    return noise
