"""ROME (Meng et al. 2022, 2202.05262): write a fact into one MLP matrix by a rank-one change.

    edit = rome(model, split, layer=3)

The matrix W of `down` is read as a memory of key → value. For each fact, one after the other:

    k   key: what `down` reads at the subject's last token, averaged over contexts
    v   value: W k + δ, see `helpers.unlearning.values`
    W ← W + (v − W k) uᵀ / (uᵀ k),   u = C⁻¹ k

so that afterwards W k = v, at the least cost to the keys of text (C is their second moment).

The averaged key is used in all three places: u, denominator, W k. The published code takes the key of the bare prompt
in two of them, so that W k is not v, and its norms explode over many edits (Gupta et al. 2024, 2403.07175).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from helpers.facts import Facts
from helpers.masks import Mask, SelectionError, mask
from helpers.models import Model
from helpers.progress import progress
from helpers.splits import Split
from helpers.unlearning.covariances import preserved, texts_to_preserve
from helpers.unlearning.edit import Edit
from helpers.unlearning.values import Values, ask, mean_keys, optimise, sizes
from helpers.unlearning.weights import at_rest


def rome(model: Model, split: Split, layer: int | Mask, values: Values = Values(), texts: Sequence[str] | None = None,
         seed: int = 0, *, forget: Facts | None = None, names: float = 0.5, n_tokens: int | None = None,
         ridge: float = 1e-3, cache: Path | str | None = None) -> Edit:
    """Write each fact's edit answer into `down` at a layer; the model itself is the same before and after.

    Args:
        layer: where facts are looked up; of a mask, the middle one of its layers.
        texts: what C and the contexts come from; None takes the tiny models' own kind and the facts to retain.
        forget: the facts to write, in this order; by default `split.forget`.
        names: the share of C that stands for names of facts to retain (`covariances.preserved`); published is 0.
        n_tokens: how many tokens of the texts C is computed from, all by default; the record has the number.
        ridge: added to C, relative to its mean eigenvalue. With little text C has no inverse without it.
        cache: folder for C.

    `edit.history` has one row a fact: see `optimise`, and `change` and `weight`, the norms of its update and of W
    after it.
    """
    layers = down_layers(model, layer)
    layer = layers[len(layers) // 2]
    chosen = mask(model, [f"down {layer}"], f"down {layer}")
    texts = texts_to_preserve(split, seed) if texts is None else texts
    requests = ask(model, split, split.forget if forget is None else forget, texts, values, seed)
    covariance = preserved(model, split, [layer], texts, values.format, names, n_tokens, cache)[layer]
    parameter, rows = model.matrix("down", layer)[0], []
    weight = parameter.detach().double()
    with restored(model, [layer]):
        keys, _ = mean_keys(model, requests, layer)  # no edit of `down` changes what it reads
        directions, size = covariance.solve(keys, ridge), sizes(model, requests, layer)
        for number in progress(range(len(requests)), "rome"):
            one = torch.tensor([number])
            delta, table = optimise(model, requests[one], layer, size[one], values)
            key, direction = keys[number], directions[number]
            update = torch.outer(delta[0], direction / (direction @ key))
            weight = weight + update
            parameter.data.copy_(weight)
            rows.append(table.assign(change=update.norm().item(), weight=weight.norm().item()))
    record = {"method": "rome", "layer": layer, "values": asdict(values), "seed": seed, "split": split.record,
              "n_trained_on": len(requests), "ridge": ridge,
              "covariance": {"names": names, "n_tokens": covariance.n_tokens, "key": covariance.key}}
    new = {f"{model.path('down', layer)}.weight": weight}
    return Edit.of(model, chosen, new, record, pd.concat(rows, ignore_index=True))


def down_layers(model: Model, where: int | Sequence[int] | Mask) -> list[int]:
    """Layers whose `down` a closed-form method may write to: those given, or those that a mask selects whole."""
    if isinstance(where, Mask):
        where.check(model)
        layers = [l for l in where.layers if where.entries.get(f"{model.path('down', l)}.weight", False) is None]
        if not layers:
            raise SelectionError(f"mask {where.name!r} selects no whole `down` matrix, the only one that closed-form "
                                 "editing writes to")
        return layers
    return sorted({where} if isinstance(where, int) else set(where))


@contextmanager
def restored(model: Model, layers: Sequence[int]) -> Iterator[None]:
    """The matrices `down` of these layers may change within the block; afterwards they are as before, bit for bit."""
    weights = [model.matrix("down", layer)[0] for layer in layers]
    old = [weight.detach().clone() for weight in weights]
    try:
        with at_rest(model):
            yield
    finally:
        for weight, value in zip(weights, old):
            weight.data.copy_(value)
