"""AlphaEdit (Fang et al. 2024, 2410.02355): MEMIT confined to directions that the keys of text do not use.

    edit = alphaedit(model, split, layers=[2, 3, 4])

With U an orthonormal basis of the directions in which the second moment C of text's keys (almost) vanishes, K the
keys of the facts to write, K₁ those of facts written earlier, and R what is missing (as in MEMIT),

    ΔW = R Aᵀ (A Aᵀ + A₁ A₁ᵀ + α I)⁻¹ Uᵀ,   A = Uᵀ K,  A₁ = Uᵀ K₁

which is the published R Kᵀ P (K Kᵀ P + K₁ K₁ᵀ P + α I)⁻¹ with P = U Uᵀ, solved in fewer dimensions. What `down` gives
for text changes by at most `share` of ‖ΔW‖² times its keys' mean square, and not at all where C has a null space in
earnest.

The published thresholds are numbers that fit one model (eigenvalues below 2e-2; α = 10). Here the directions are
those that together hold `share` of the keys' mean square, and α is `ridge` times the mean ‖A‖² of the facts. No state
is kept between calls: facts written earlier are named in `earlier`, and their keys are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from helpers.facts import Facts
from helpers.masks import Mask
from helpers.models import Model
from helpers.splits import Split
from helpers.unlearning.covariances import preserved, texts_to_preserve
from helpers.unlearning.edit import Edit, EditError
from helpers.unlearning.memit import spread
from helpers.unlearning.rome import down_layers
from helpers.unlearning.values import Values, ask, mean_keys


def alphaedit(model: Model, split: Split, layers: Sequence[int] | Mask, values: Values = Values(),
              texts: Sequence[str] | None = None, seed: int = 0, *, forget: Facts | None = None,
              earlier: Facts | None = None, share: float = 0.005, ridge: float = 0.1, names: float = 0.5,
              n_tokens: int | None = None, cache: Path | str | None = None) -> Edit:
    """Write all edit answers at once into `down` of these layers, outside the space of text's keys.

    `share`: of the keys' mean square, how much the directions written to may hold; `earlier`: facts written before,
    whose outputs are to stay. The other arguments and the history are those of `memit`. Raises `CovarianceError`
    where no direction holds so little.
    """
    layers, texts = down_layers(model, layers), texts_to_preserve(split, seed) if texts is None else list(texts)
    if ridge <= 0:
        raise EditError(f"ridge={ridge}: it must be positive")
    found = preserved(model, split, layers, texts, values.format, names, n_tokens, cache)
    bases = {layer: found[layer].null_space(share, model.part("down", layer).weight.device) for layer in layers}
    before = ask(model, split, earlier, texts, values, seed) if earlier is not None and len(earlier) else None

    def solve(layer: int, keys: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        inside = keys @ bases[layer]
        rows = inside if before is None else torch.cat([inside, mean_keys(model, before, layer)[0] @ bases[layer]])
        alpha = ridge * inside.square().sum(1).mean()
        system = rows.T @ rows
        system.diagonal().add_(alpha)
        return change.T @ torch.linalg.solve(system, inside.T).T @ bases[layer].T

    requests = ask(model, split, split.forget if forget is None else forget, texts, values, seed)
    record = {"method": "alphaedit", "share": share, "ridge": ridge, "seed": seed,
              "n_earlier": 0 if earlier is None else len(earlier),
              "directions": {str(layer): basis.shape[1] for layer, basis in bases.items()},
              "covariance": {"names": names, "n_tokens": found[layers[0]].n_tokens, "keys": [c.key for c in found.values()]}}
    return spread(model, split, requests, layers, values, solve, record)
