"""TransformerLens as an independent second opinion on the same weights and prompts.

Other people's code, so agreement is evidence. It runs on a copy of the model, since TransformerLens
folds norms into the weights next to them. Not every family is served by all of it: its direct logit
attribution refuses blocks with post-norms (Gemma2), its activation patching does not.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from functools import partial

import pandas as pd
import torch
from transformers import AutoTokenizer

from helpers.localization.counterfactual import Pairs
from helpers.models import Model
from helpers.prompts import PromptSet


def bridge(model: Model, folded: bool = True):
    """A TransformerLens bridge over a copy of the model; `folded`: in compatibility mode (norms folded into the weights)."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        # The bridge reads its configuration by name; a folder with our own serves as one, offline.
        model.hf.config.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        found = TransformerBridge.boot_transformers(folder, hf_model=copy.deepcopy(model.hf), tokenizer=AutoTokenizer.from_pretrained(folder))
    if folded:
        found.enable_compatibility_mode()
    return found


@torch.no_grad()
def lens_head_attribution(model: Model, prompts: PromptSet) -> pd.Series | None:
    """Mean direct attribution of every head to logit(true) − logit(edit), by `head l.h`; None where it is not served.

    Prompts are run in groups of equal length, without padding.
    """
    if "attn_post_norm" in model.roles:
        return None
    from transformer_lens.tools.analysis import direct_logit_attribution

    lens = bridge(model)
    total = torch.zeros(model.n_layers * model.n_heads)
    lengths = prompts.mask.sum(1)
    for length in lengths.unique().tolist():
        part = prompts[(lengths == length).nonzero().flatten()]
        tokens = _without_padding(part)
        found = direct_logit_attribution(lens, tokens, part.answer_ids, part.edit_ids, unit="head")
        total += found.attribution[: len(total)].float().sum(1).cpu()
    return pd.Series((total / len(prompts)).numpy(), index=[str(c) for c in model.components("head")])


@torch.no_grad()
def lens_residual_patching(model: Model, twins: Pairs, limit: int = 8) -> pd.DataFrame:
    """The residual stream patched by hooks of TransformerLens, layer by layer, at the subject's last token and at the last position.

    It knows columns and not roles, so it is asked about at most `limit` pairs whose prompts are equally long and whose
    subjects end in the same column: those of the commonest kind. Columns: subject, relation, layer, position, `ld_patched`
    (the logit difference of the patched run), named as in `patching.patch`.
    """
    padding = twins.clean.mask.shape[1] - twins.clean.mask.sum(1)
    kinds = pd.Series(list(zip(padding.tolist(), twins.clean.subject[:, 1].tolist())))
    rows = kinds.index[kinds == kinds.value_counts().index[0]][:limit].tolist()
    some = twins[rows]
    end = int(some.clean.subject[0, 1] - padding[rows[0]])
    clean, corrupted = _without_padding(some.clean), _without_padding(some.corrupted)
    columns = {"subject last": end - 1, "last": clean.shape[1] - 1}
    lens = bridge(model, folded=False)
    _, cache = lens.run_with_cache(clean)
    parts = []
    for layer, (position, column) in itertools.product(range(model.n_layers), columns.items()):
        name = f"blocks.{layer}.hook_resid_pre"
        logits = lens.run_with_hooks(corrupted, fwd_hooks=[(name, partial(_put, column, cache[name]))])[:, -1]
        true, other = logits.gather(1, some.answers).float().T.tolist()
        parts += [{"subject": fact.subject, "relation": fact.relation.name, "layer": layer, "position": position, "ld_patched": a - b}
                  for fact, a, b in zip(some.clean.facts, true, other)]
    return pd.DataFrame(parts)


def _put(column: int, clean: torch.Tensor, activation: torch.Tensor, hook) -> torch.Tensor:
    activation[:, column] = clean[:, column]
    return activation


def _without_padding(prompts: PromptSet) -> torch.Tensor:
    """(n, length) tokens of prompts of one length."""
    return torch.stack([row[mask.bool()] for row, mask in zip(prompts.tokens, prompts.mask)])
