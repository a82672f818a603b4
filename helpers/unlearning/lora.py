"""LoRA (Hu et al. 2021, 2106.09685): low-rank matrices beside the model, as a baseline and for relearning attacks.

Every adapted matrix W (out, in) computes W x + α/r · B A x; A (r, in) starts random, B (out, r) at 0. A and B are
no part of the model: forward hooks add their product while `with lora:` lasts, and no weight is written.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from helpers.facts import Facts
from helpers.masks import Mask
from helpers.models import Model
from helpers.selection import everything
from helpers.splits import Split
from helpers.unlearning.edit import Edit
from helpers.unlearning.finetune import fit
from helpers.unlearning.forward import layer_of
from helpers.unlearning.objectives import Objective
from helpers.unlearning.training import Settings
from helpers.unlearning.weights import Beside


class Lora(Beside):
    """Adapters of every matrix that the mask touches (all of the model's blocks without one).

    `rank` None is d_model / 6, which is the paper's 512 at its models' widths; `alpha` and `dropout` are the paper's.
    Of a partly masked matrix only the masked part of B A is added. It has what a training loop needs, see
    `helpers.unlearning.weights`; `values()` are the weights with the adapters merged in.
    """

    def __init__(self, model: Model, mask: Mask | None = None, rank: int | None = None, alpha: float = 32.0,
                 dropout: float = 0.05, seed: int = 0):
        mask = everything(model) if mask is None else mask
        mask.check(model)
        rank = max(1, model.d_model // 6) if rank is None else rank
        if rank < 1 or not 0 <= dropout < 1:
            raise ValueError(f"LoRA: rank {rank} and dropout {dropout}; rank is at least 1, dropout from 0 to below 1")
        self.model, self.mask, self.seed = model, mask, seed
        self.rank, self.scale, self.dropout = rank, alpha / rank, dropout
        self.lowest = min(layer_of(model, name) for name in mask.entries)
        self.modules = {name: model.hf.get_submodule(name.removesuffix(".weight")) for name in mask.entries}
        self.parts = {name: None if part is None else part.to(self.modules[name].weight.device) for name, part in mask.entries.items()}
        generator = torch.Generator().manual_seed(seed)
        self.down, self.up = {}, {}
        for name, module in self.modules.items():
            # as nn.Linear starts: uniform within ± 1 / sqrt(inputs)
            a = (2 * torch.rand(rank, module.in_features, generator=generator) - 1) / module.in_features**0.5
            self.down[name] = a.to(module.weight.device).requires_grad_()
            self.up[name] = torch.zeros(module.out_features, rank, device=module.weight.device).requires_grad_()
        self.tensors = [*self.down.values(), *self.up.values()]
        self.begin(0)

    @property
    def n_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def noisy(self) -> bool:
        return self.dropout > 0

    def register(self) -> list[RemovableHandle]:
        return [module.register_forward_hook(self._adapter(name)) for name, module in self.modules.items()]

    def begin(self, step: int) -> None:
        """Dropout of a step depends on the seed and the step alone, so a resumed run repeats it."""
        self._generators = {}
        self._draw = self.seed * 1_000_003 + step

    def write(self) -> None:
        """Nothing to do: the model reads A and B themselves."""

    @torch.no_grad()
    def values(self) -> dict[str, torch.Tensor]:
        """The adapted matrices, merged in fp32 and rounded to the model's dtype."""
        weights = {name: module.weight.to(self.up[name].dtype) + self._product(name) for name, module in self.modules.items()}
        return {name: weight.to("cpu", self.modules[name].weight.dtype) for name, weight in weights.items()}

    def merged(self, record: dict | None = None) -> Edit:
        """The adapters as an edit of the model."""
        return Edit.of(self.model, self.mask, self.values(), {"method": "lora", "rank": self.rank, **(record or {})})

    def _product(self, name: str) -> torch.Tensor:
        product = self.scale * (self.up[name] @ self.down[name])
        return product if self.parts[name] is None else product * self.parts[name]

    def _adapter(self, name: str):
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0].to(self.down[name].dtype)
            if torch.is_grad_enabled() and self.dropout:
                x = x * self._keep(x)
            if self.parts[name] is None:
                change = self.scale * F.linear(F.linear(x, self.down[name]), self.up[name])
            else:
                change = F.linear(x, self._product(name))
            return output + change.to(output.dtype)
        return add

    def _keep(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout's factors; drawn from our own generator, so that no global seed matters."""
        device = x.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._draw)
        kept = torch.rand(x.shape, device=device, generator=self._generators[device]) >= self.dropout
        return kept / (1 - self.dropout)


def finetune_lora(model: Model, split: Split, objective: str | Objective = "edit", settings: Settings = Settings(),
                  texts=None, seed: int = 0, *, mask: Mask | None = None, rank: int | None = None, forget: Facts | None = None,
                  checkpoint=None, watch=None) -> Edit:
    """`finetune` through LoRA: same loss and schedule; the result is merged into an ordinary `Edit`.

    Without a mask every matrix of the blocks is adapted. The merged change has rank r in each matrix, but touches all of it.
    """
    lora = Lora(model, mask, rank, seed=seed)
    return fit(model, lora, lora.mask, split, objective, settings, texts, seed, forget=forget, checkpoint=checkpoint, watch=watch,
               method=f"lora r={lora.rank}")
