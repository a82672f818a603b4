"""Whether tracing can be trusted on a model, asked once when it is loaded.

A new release of transformers, or a family that merely looks like a known one (an extra multiplier on
the residual is enough), makes interventions wrong without any error. Ten tokens tell.
"""

from __future__ import annotations

import math

import torch

from helpers.models import Model
from helpers.sites import SITES, Batch, TracingError
from helpers.tracing import Intervention, intervene, read

EDITABLE = tuple(site for site in SITES if site != "attn_pattern")


def self_check(model: Model) -> None:
    """Raise `TracingError` unless, on a batch of two short rows of which one is padded,

    - every site of every layer has the shape that its name promises, and logits are finite;
    - patching all of them with their own values leaves the logits exactly as they were;
    - zeroing any one of them changes the logits, so that the previous point means something;
    - embedding, attention and MLP contributions add up to the final residual, up to rounding.
    """
    batch = _short_batch(model)
    everywhere = torch.ones_like(batch.mask)
    pairs = [(site, layer) for layer in range(model.n_layers) for site in EDITABLE if site != "embed" or layer == 0]
    clean = read(model, batch, pairs)
    if not clean.logits.isfinite().all():
        raise TracingError(f"{model.name}: logits in {model.dtype} are not finite numbers")

    patches = [Intervention(*pair, everywhere, clean[pair]) for pair in pairs]
    if not torch.equal(intervene(model, batch, patches).logits, clean.logits):
        raise TracingError(f"{model.name}: patching activations with their own values changes the logits")

    for site in EDITABLE:
        layer = 0 if site == "embed" else model.n_layers - 1
        zeroed = intervene(model, batch, [Intervention(site, layer, "all", op="zero")])
        if torch.equal(zeroed.logits, clean.logits):
            raise TracingError(f"{model.name}: zeroing {site} at layer {layer} does not change the logits")

    _check_sum(model, clean.activations)


def _check_sum(model: Model, activations: dict[tuple[str, int], torch.Tensor]) -> None:
    layers = range(model.n_layers)
    parts = [("embed", 0)] + [(site, layer) for layer in layers for site in ("attn_out", "mlp_out")]
    total = sum(activations[pair].cpu().double() for pair in parts)
    final = activations["resid_post", model.n_layers - 1].cpu().double()
    # Each addition rounds once, relative to the residual at that point; the errors add like a random walk.
    size = max(activations["resid_post", layer].cpu().double().norm(dim=-1).max().item() for layer in layers)
    allowed = 4 * torch.finfo(model.dtype).eps * math.sqrt(len(parts)) * size
    error = (total - final).norm(dim=-1).max().item()
    if not error <= allowed:
        raise TracingError(
            f"{model.name}: embedding, attention and MLP contributions do not add up to the final residual "
            f"(off by {error:.2g}, allowed {allowed:.2g}), so this architecture is wired in an unknown way"
        )


def _short_batch(model: Model) -> Batch:
    """Two rows of five tokens spread over the vocabulary, the first of the second row being padding."""
    tokens = torch.linspace(0, model.vocab_size - 1, 10).long().view(2, 5)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 0] = False
    return Batch(tokens, mask, (mask.cumsum(1) - 1).clamp(min=0), last=torch.tensor([4, 4]))
