"""MEMIT (Meng et al. 2022, 2210.07229): write many facts at once into the MLP matrices of several layers.

    edit = memit(model, split, layers=[2, 3, 4])

A target is found for each fact: the residual z after the highest layer, with δ added there
(`helpers.unlearning.values`). From the lowest layer to the highest, each takes its share of what is still missing,

    R = (z − residual now) / (layers left),   ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹

the least-squares solution for all facts (keys K, one column a fact) that also keeps the outputs for λ tokens of text,
and the residual is computed again. With one fact and one layer this is ROME's update times kᵀC⁻¹k / (λ + kᵀC⁻¹k):
ROME itself as λ → 0, if no post-norm follows.

As in ROME, keys and residuals are averaged over contexts everywhere; the published code takes the residual of the
bare prompt. λ is given relative to d_mlp, the mean of kᵀC⁻¹k over text: published are 15,000 for 16,384 neurons
(GPT-J) and 20,000 for 6,400 (GPT-2 XL).

Under a post-norm (Gemma2) `down` does not write to the residual: what it should give there is divided by the norm's
gain and brought to the only length that a norm gives, at least squared error, and R is the change of the output of
`down` that achieves this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from helpers.facts import Facts
from helpers.masks import Mask, mask
from helpers.models import Model
from helpers.splits import Split
from helpers.unlearning.covariances import preserved, texts_to_preserve
from helpers.unlearning.edit import Edit, EditError
from helpers.unlearning.rome import down_layers, restored
from helpers.unlearning.values import Requests, Values, ask, mean_keys, optimise, sizes

# layer, keys (n, d_mlp), wanted change of the outputs (n, d_model) → change of the matrix (d_model, d_mlp), all float64
Solve = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def memit(model: Model, split: Split, layers: Sequence[int] | Mask, values: Values = Values(),
          texts: Sequence[str] | None = None, seed: int = 0, *, forget: Facts | None = None, preserve: float = 1.0,
          names: float = 0.5, n_tokens: int | None = None, ridge: float = 1e-3, cache: Path | str | None = None) -> Edit:
    """Write all edit answers at once into `down` of these layers; the model itself is the same before and after.

    `layers`: numbers, or a mask whose `down` matrices are taken. `preserve` is λ / d_mlp: more leaves text more as it
    was, and facts less completely written. The other arguments are those of `rome`. `edit.history` has one row a
    layer: `missing` (mean length of what is still missing in the residual before the layer changes), `change` and
    `weight` (norms of ΔW and of W after it).
    """
    layers, texts = down_layers(model, layers), texts_to_preserve(split, seed) if texts is None else list(texts)
    if preserve < 0:
        raise EditError(f"preserve={preserve}: λ is not negative")
    found = preserved(model, split, layers, texts, values.format, names, n_tokens, cache)

    def solve(layer: int, keys: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        # (λC + KKᵀ)⁻¹K = C⁻¹K (λ + KᵀC⁻¹K)⁻¹: a system of n equations instead of d_mlp
        inverted = found[layer].solve(keys, ridge)
        gram = keys @ inverted.T
        gram.diagonal().add_(preserve * model.d_mlp)
        return change.T @ torch.linalg.solve(gram, inverted)

    requests = ask(model, split, split.forget if forget is None else forget, texts, values, seed)
    record = {"method": "memit", "preserve": preserve, "ridge": ridge, "seed": seed,
              "covariance": {"names": names, "n_tokens": found[layers[0]].n_tokens, "keys": [c.key for c in found.values()]}}
    return spread(model, split, requests, layers, values, solve, record)


def spread(model: Model, split: Split, requests: Requests, layers: Sequence[int], values: Values, solve: Solve,
           record: dict) -> Edit:
    """Targets at the highest layer, reached in equal steps by `solve` at each layer, lowest first."""
    top, rows, new = layers[-1], [], {}
    with restored(model, layers):
        delta, found = optimise(model, requests, top, sizes(model, requests, top, behind=True), values, behind=True)
        _, goal = mean_keys(model, requests, top, delta=delta, behind=True)
        for left, layer in zip(range(len(layers), 0, -1), layers):
            keys, now = mean_keys(model, requests, layer, top)
            parameter = model.matrix("down", layer)[0]
            weight, share = parameter.detach().double(), (goal - now) / left
            norm, bias = model.mlp_post_norm(layer), model.bias("down", layer)
            if norm is not None:
                output = keys @ weight.T + (0 if bias is None else bias[0].double())
                share = through(norm, output, share)
            change = solve(layer, keys, share)
            new[f"{model.path('down', layer)}.weight"] = weight = weight + change
            parameter.data.copy_(weight)
            rows.append({"layer": layer, "missing": (goal - now).norm(dim=1).mean().item(),
                         "change": change.norm().item(), "weight": weight.norm().item()})
        left_over = (goal - mean_keys(model, requests, layers[0], top)[1]).norm(dim=1).mean().item()
    losses = {name: float(found[name].mean()) for name in ("loss_before", "loss_after")}
    record = {**record, "layers": list(layers), "values": asdict(values), "split": split.record,
              "n_trained_on": len(requests), **losses, "missing_after": left_over}
    chosen = mask(model, [f"down {layer}" for layer in layers], f"down {', '.join(map(str, layers))}")
    return Edit.of(model, chosen, new, record, pd.DataFrame(rows))


@torch.no_grad()
def through(norm: nn.Module, output: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Change of `output` (n, d) that changes norm(output) by `change`, as nearly as a root-mean-square norm can.

    A norm with gain g gives g·s, with s on the sphere of radius √d. Least squares, ‖g·s − target‖² on that sphere,
    has the solution s = g·target / (g² + μ), with the one μ > −min g² that gives s its length. The length of the
    output, which the norm ignores, is kept.
    """
    n, d = output.shape
    ones = torch.ones(1, d, dtype=output.dtype, device=output.device)
    plain = lambda x: norm(x.float()).double()  # norms compute in float32 whatever they get
    gain, target = plain(ones)[0], plain(output) + change
    if not torch.allclose(plain(2.0 * output), plain(output), rtol=1e-3, atol=1e-4):
        raise EditError(f"{type(norm).__name__} between `down` and the residual does not ignore the length of its "
                        "input: no closed form")
    on_sphere = lambda mu: gain * target / (gain**2 + mu)
    low = -(gain**2).min() + torch.full((n, 1), 1e-9, dtype=output.dtype, device=output.device)
    high = low + (gain * target).norm(dim=1, keepdim=True) / d**0.5 + 1.0
    for _ in range(100):  # the length falls with μ
        middle = (low + high) / 2
        longer = on_sphere(middle).norm(dim=1, keepdim=True) > d**0.5
        low, high = torch.where(longer, middle, low), torch.where(longer, high, middle)
    s = on_sphere(high)
    return s * (output.norm(dim=1, keepdim=True) / s.norm(dim=1, keepdim=True)) - output
