"""The same quantities by plain nnsight: a loop of traces, one a component.

Written for Llama's modules, and to be quick as such loops go: logits are taken at the last position alone, and what
does not change from trace to trace is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import nnsight
import torch
from nnsight import NNsight

from helpers.localization.causal_tracing import noise_scale, subject_noise
from helpers.localization.counterfactual import Pairs
from helpers.localization.recovery import measure
from helpers.models import Component, Model
from helpers.promptsets import PromptSet


@dataclass(frozen=True)
class Activations:
    """Of one run, by layer: the residual before the block, z, and what attention and MLP put out, each (n, length, …)."""

    residual: list[torch.Tensor]
    z: list[torch.Tensor]
    attention: list[torch.Tensor]
    mlp: list[torch.Tensor]


class Loops:
    """Every method returns (components, prompts): logit differences of patched runs, or effects."""

    def __init__(self, model: Model, pairs: Pairs):
        self.model, self.pairs = model, pairs
        self.view = NNsight(model.hf)

    @torch.no_grad()
    def head_paths(self) -> torch.Tensor:
        clean, corrupt = self._activations(self.pairs.clean), self._activations(self.pairs.corrupted)
        found = []
        for sender in self.model.components("head"):
            own = self._columns(sender.head)
            with self._trace(self.pairs.corrupted):
                self._block(sender.layer).self_attn.o_proj.input[..., own] = clean.z[sender.layer][..., own]
                for layer in range(sender.layer + 1, self.model.n_layers):
                    self._block(layer).self_attn.output = (corrupt.attention[layer], None)
                logits = self.view.lm_head.output.save()
            found.append(self._ld(logits))
        return torch.stack(found)

    @torch.no_grad()
    def receiver_paths(self, senders: Sequence[Component], receivers: Sequence[Component]) -> torch.Tensor:
        clean, corrupt = self._activations(self.pairs.clean), self._activations(self.pairs.corrupted)
        found = []
        for sender in senders:
            change = self._write(sender, clean, corrupt)
            reading = {receiver.layer for receiver in receivers if receiver.layer > sender.layer}
            frozen = {layer: corrupt.z[layer].clone() for layer in reading}
            with self._trace(self.pairs.corrupted):
                for layer in range(min(reading), self.model.n_layers):
                    block = self._block(layer)
                    if layer not in reading:
                        block.self_attn.output = (corrupt.attention[layer], None)
                        continue
                    block.input_layernorm.input = corrupt.residual[layer] + change
                    for receiver in receivers:
                        if receiver.layer == layer:
                            own = self._columns(receiver.head)
                            frozen[layer][..., own] = block.self_attn.o_proj.input[..., own]
                    block.self_attn.o_proj.input = frozen[layer]
                logits = self.view.lm_head.output.save()
            found.append(self._ld(logits))
        return torch.stack(found)

    @torch.no_grad()
    def direct_paths(self, sender: Component) -> torch.Tensor:
        clean, corrupt = self._activations(self.pairs.clean), self._activations(self.pairs.corrupted)
        change = self._write(sender, clean, corrupt)
        found = []
        for layer in range(sender.layer + 1, self.model.n_layers):
            normed = self.model.attn_norm(layer)(corrupt.residual[layer] + change)
            queries = self.model.part("q", layer)(normed)
            for head in range(self.model.n_heads):
                own = self._columns(head)
                with self._trace(self.pairs.corrupted):
                    self._block(layer).self_attn.q_proj.output[..., own] = queries[..., own]
                    logits = self.view.lm_head.output.save()
                found.append(self._ld(logits))
        return torch.stack(found)

    @torch.no_grad()
    def residual(self) -> torch.Tensor:
        clean, found = self._activations(self.pairs.clean), []
        for layer in range(self.model.n_layers):
            for position in range(self.pairs.clean.tokens.shape[1]):
                with self._trace(self.pairs.corrupted):
                    self._block(layer).input[:, position] = clean.residual[layer][:, position]
                    logits = self.view.lm_head.output.save()
                found.append(self._ld(logits))
        return torch.stack(found)

    @torch.no_grad()
    def heads(self) -> torch.Tensor:
        clean, found = self._activations(self.pairs.clean), []
        for component in self.model.components("head"):
            own = self._columns(component.head)
            with self._trace(self.pairs.corrupted):
                self._block(component.layer).self_attn.o_proj.input[..., own] = clean.z[component.layer][..., own]
                logits = self.view.lm_head.output.save()
            found.append(self._ld(logits))
        return torch.stack(found)

    @torch.no_grad()
    def causal_tracing(self) -> torch.Tensor:
        prompts = self.pairs.clean
        noise = 3 * noise_scale(self.model, prompts) * subject_noise(prompts, self.model.d_model, seed=0)
        clean, found = self._activations(prompts), []
        for layer in range(self.model.n_layers):
            for position in range(prompts.tokens.shape[1]):
                with self._trace(prompts):
                    self.view.model.embed_tokens.output += noise
                    self._block(layer).input[:, position] = clean.residual[layer][:, position]
                    logits = self.view.lm_head.output.save()
                found.append(self._ld(logits))
        return torch.stack(found)

    def attribution(self) -> torch.Tensor:
        """All gradients in one trace: here a loop would be a straw man."""
        with torch.no_grad():
            clean = self._activations(self.pairs.clean)
        with self._trace(self.pairs.corrupted):
            first = self._block(0)
            first.input = first.input.detach().requires_grad_()  # the weights are frozen
            z, mlp = nnsight.save([]), nnsight.save([])
            for layer in range(self.model.n_layers):
                z.append(self._block(layer).self_attn.o_proj.input)
                mlp.append(self._block(layer).mlp.output)
            logits = self.view.lm_head.output.save()
        pair = logits[:, -1].gather(1, self.pairs.answers)
        gradients = torch.autograd.grad((pair[:, 0] - pair[:, 1]).sum(), [*z, *mlp])
        effects = [(a - b.detach()) * g for a, b, g in zip([*clean.z, *clean.mlp], [*z, *mlp], gradients)]
        by_head = [effect.unflatten(-1, (self.model.n_heads, -1)).sum((1, 3)).T for effect in effects[: len(z)]]
        by_mlp = [effect.sum((1, 2)) for effect in effects[len(z) :]]
        return torch.cat([torch.cat([heads, own[None]]) for heads, own in zip(by_head, by_mlp)]).double()

    def _trace(self, prompts: PromptSet):
        return self.view.trace(
            input_ids=prompts.tokens,
            attention_mask=prompts.mask,
            position_ids=prompts.position_ids,
            use_cache=False,
            logits_to_keep=1,
        )

    def _activations(self, prompts: PromptSet) -> Activations:
        with self._trace(prompts):
            residual, z, attention, mlp = (nnsight.save([]) for _ in range(4))
            for layer in range(self.model.n_layers):
                residual.append(self._block(layer).input.clone())
                z.append(self._block(layer).self_attn.o_proj.input.clone())
                attention.append(self._block(layer).self_attn.output[0].clone())
                mlp.append(self._block(layer).mlp.output.clone())
        return Activations(residual, z, attention, mlp)

    def _write(self, sender: Component, clean: Activations, corrupt: Activations) -> torch.Tensor:
        """By how much a head's clean output changes the residual, (n, length, d_model)."""
        own = self._columns(sender.head)
        change = clean.z[sender.layer][..., own] - corrupt.z[sender.layer][..., own]
        return change @ self.model.part("o", sender.layer).weight[:, own].T

    def _block(self, layer: int):
        return self.view.model.layers[layer]

    def _columns(self, head: int) -> slice:
        """Where a head is among the features of z, and of the queries."""
        return slice(head * self.model.d_head, (head + 1) * self.model.d_head)

    def _ld(self, logits: torch.Tensor) -> torch.Tensor:
        return measure(logits[:, -1], self.pairs.answers)["ld"]
