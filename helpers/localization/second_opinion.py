"""TransformerLens as an independent second opinion on the same weights and prompts.

Other people's code, so agreement is evidence. It runs on a copy of the model, since TransformerLens
folds norms into the weights next to them. Not every family is served: its direct logit attribution
refuses blocks with post-norms (Gemma2).
"""

from __future__ import annotations

import copy
import tempfile

import pandas as pd
import torch
from transformers import AutoTokenizer

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
        tokens = torch.stack([row[mask.bool()] for row, mask in zip(part.tokens, part.mask)])
        found = direct_logit_attribution(lens, tokens, part.answer_ids, part.edit_ids, unit="head")
        total += found.attribution[: len(total)].float().sum(1).cpu()
    return pd.Series((total / len(prompts)).numpy(), index=[str(c) for c in model.components("head")])
