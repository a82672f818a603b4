"""What an optimizer gets to see of a model: the masked weights and nothing else.

`MaskedWeights` trains them inside the model; what is `Beside` it (LoRA, soft prompts) acts through hooks. The training loop
uses either through

    tensors       what the optimizer updates; after a backward pass their `.grad` holds the gradient
    lowest        the lowest block that changes: nothing below needs a gradient, or a second pass
    noisy         whether passes draw random numbers (dropout)
    begin(step)   called before each step
    write()       called after each update
    snapshot(), rollback(saved)
    values()      the new values, whole parameters by name, on the CPU

within `with trained:`, which leaves the model as it found it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

import torch
from torch.utils.hooks import RemovableHandle

from helpers.masks import Mask
from helpers.models import Model
from helpers.unlearning.edit import put, select
from helpers.unlearning.forward import layer_of


@contextmanager
def at_rest(model: Model) -> Iterator[None]:
    """Evaluation mode, as the paper trains, and no parameter asking for a gradient; afterwards as before."""
    training, asked = model.hf.training, [p for p in model.hf.parameters() if p.requires_grad]
    model.hf.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.hf.train(training)
        for parameter in asked:
            parameter.requires_grad_(True)


class Beside(ABC):
    """Tensors that are no part of the model, and act on it by the hooks of `register` while the `with` block lasts."""

    model: Model
    tensors: list[torch.Tensor]

    @abstractmethod
    def register(self) -> list[RemovableHandle]:
        """The hooks, in place."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(at_rest(self.model))
            for hook in self.register():
                stack.callback(hook.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @torch.no_grad()
    def snapshot(self) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in self.tensors]

    @torch.no_grad()
    def rollback(self, saved: list[torch.Tensor]) -> None:
        for tensor, value in zip(self.tensors, saved):
            tensor.copy_(value)


class MaskedWeights:
    """The masked weights of a model, trained in place and put back.

    The optimizer works on fp32 masters, so that small updates to bf16 weights are not rounded away; of a partly
    masked parameter it sees the selected weights as one vector, and holds state for no other. fp32 weights that
    are masked whole are their own masters. With `masters=False` the optimizer works in the model's own precision,
    as the paper did.
    """

    noisy = False

    def __init__(self, model: Model, mask: Mask, masters: bool = True):
        mask.check(model)
        named = dict(model.hf.named_parameters())
        self.model = model
        self.parameters = {name: named[name] for name in mask.entries}
        self.parts = {name: None if part is None else part.to(named[name].device) for name, part in mask.entries.items()}
        self.masters = masters
        self.lowest = min(layer_of(model, name) for name in mask.entries)
        self.tensors: list[torch.Tensor] = []

    def __enter__(self) -> MaskedWeights:
        self._old = {name: select(p.detach(), self.parts[name]).to("cpu", copy=True) for name, p in self.parameters.items()}
        self._gradients = {name: p.grad for name, p in self.parameters.items()}
        with ExitStack() as stack:
            stack.enter_context(at_rest(self.model))
            stack.callback(self._put_back)
            for name, parameter in self.parameters.items():
                chosen = select(parameter.data, self.parts[name])
                # of a whole parameter in a wide enough dtype this is the parameter's own memory
                master = chosen.to(torch.promote_types(chosen.dtype, torch.float32)) if self.masters else chosen
                self.tensors.append(master)
                parameter.grad = None  # one that somebody left there is not ours to add to
                parameter.requires_grad_(True)
                stack.callback(parameter.register_post_accumulate_grad_hook(self._collector(name, master)).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _put_back(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = self._gradients[name]
            put(parameter.data, self.parts[name], self._old[name])
        self.tensors = []

    def begin(self, step: int) -> None:
        """Nothing to do: no randomness here."""

    @torch.no_grad()
    def write(self) -> None:
        """The masters' values into the model, in its precision."""
        for (name, parameter), master in zip(self.parameters.items(), self.tensors):
            if master.data_ptr() != parameter.data_ptr():
                put(parameter.data, self.parts[name], master)

    @torch.no_grad()
    def snapshot(self) -> list[torch.Tensor]:
        """The masked weights as the model runs with them (not the masters, which take more memory)."""
        return [select(p.data, self.parts[name]).clone() for name, p in self.parameters.items()]

    @torch.no_grad()
    def rollback(self, saved: list[torch.Tensor]) -> None:
        for (name, parameter), value in zip(self.parameters.items(), saved):
            put(parameter.data, self.parts[name], value)

    def values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    def _collector(self, name: str, master: torch.Tensor):
        """Moves a gradient to its master as soon as it is complete, so that few exist at a time."""
        def collect(parameter: torch.Tensor) -> None:
            gradient = select(parameter.grad, self.parts[name]).to(master.dtype)
            parameter.grad = None
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        return collect
