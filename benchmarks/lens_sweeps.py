"""The same quantities by TransformerLens: its own sweeps where it has one, else a loop of runs with hooks."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import partial

import torch

from helpers.localization.causal_tracing import noise_scale, subject_noise
from helpers.localization.counterfactual import Pairs
from helpers.localization.recovery import measure
from helpers.localization.second_opinion import bridge
from helpers.models import Component, Model


class Sweeps:
    """Every method returns (components, prompts): logit differences of patched runs, or effects."""

    def __init__(self, model: Model, pairs: Pairs):
        self.model, self.pairs = model, pairs
        self.lens = bridge(model, folded=False)

    def head_paths(self) -> torch.Tensor:
        clean, corrupt = self._cache(self.pairs.clean), self._cache(self.pairs.corrupted)
        found = []
        for sender in self.model.components("head"):
            hooks = [(f"blocks.{sender.layer}.attn.hook_z", partial(_head, sender.head, clean))]
            above = range(sender.layer + 1, self.model.n_layers)
            hooks += [(f"blocks.{layer}.hook_attn_out", partial(_whole, corrupt)) for layer in above]
            found.append(self._run(hooks))
        return torch.stack(found)

    def receiver_paths(self, senders: Sequence[Component], receivers: Sequence[Component]) -> torch.Tensor:
        clean, corrupt = self._cache(self.pairs.clean), self._cache(self.pairs.corrupted)
        found = []
        for sender in senders:
            z = f"blocks.{sender.layer}.attn.hook_z"
            change = (clean[z] - corrupt[z])[:, :, sender.head] @ self.lens.blocks[sender.layer].attn.W_O[sender.head]
            reading = {receiver.layer for receiver in receivers if receiver.layer > sender.layer}
            hooks = []
            for layer in range(min(reading), self.model.n_layers):
                if layer in reading:
                    heads = [receiver.head for receiver in receivers if receiver.layer == layer]
                    read = corrupt[f"blocks.{layer}.hook_resid_pre"] + change
                    hooks.append((f"blocks.{layer}.ln1.hook_in", partial(_given, read)))
                    hooks.append((f"blocks.{layer}.attn.hook_z", partial(_but_heads, heads, corrupt)))
                else:
                    hooks.append((f"blocks.{layer}.hook_attn_out", partial(_whole, corrupt)))
            found.append(self._run(hooks))
        return torch.stack(found)

    @torch.no_grad()
    def direct_paths(self, sender: Component) -> torch.Tensor:
        """Its sweep returns one number a path, so the metric keeps each prompt's on the side."""
        from transformer_lens.patching import get_act_patch_direct_path

        found = []

        def note(logits: torch.Tensor) -> torch.Tensor:
            found.append(self._ld(logits))
            return found[-1].mean()

        clean, corrupt = self._cache(self.pairs.clean), self._cache(self.pairs.corrupted)
        tokens = self.pairs.corrupted.tokens
        get_act_patch_direct_path(self.lens, tokens, clean, corrupt, note, sender.layer, sender.head, verbose=False)
        return torch.stack(found)

    def residual(self) -> torch.Tensor:
        from transformer_lens.patching import get_act_patch_resid_pre

        return self._sweep(get_act_patch_resid_pre, self.pairs.corrupted.tokens, self._cache(self.pairs.clean))

    def heads(self) -> torch.Tensor:
        from transformer_lens.patching import get_act_patch_attn_head_out_all_pos

        return self._sweep(get_act_patch_attn_head_out_all_pos, self.pairs.corrupted.tokens, self._cache(self.pairs.clean))

    def causal_tracing(self) -> torch.Tensor:
        """Its sweep of the residual, under a hook that adds the noise throughout."""
        from transformer_lens.patching import get_act_patch_resid_pre

        prompts = self.pairs.clean
        noise = 3 * noise_scale(self.model, prompts) * subject_noise(prompts, self.model.d_model, seed=0)
        clean = self._cache(prompts)
        self.lens.add_hook("hook_embed", lambda embeddings, hook: embeddings + noise, is_permanent=True)
        try:
            return self._sweep(get_act_patch_resid_pre, prompts.tokens, clean)
        finally:
            self.lens.reset_hooks(including_permanent=True)

    def attribution(self) -> torch.Tensor:
        """Its sweep takes the prompts one by one; here each is a call, since each has answers of its own."""
        from transformer_lens.tools.analysis.attribution_patching import attribution_patch

        clean, corrupt, found = self.pairs.clean.tokens, self.pairs.corrupted.tokens, []
        self.lens.embed.requires_grad_(True)  # without one parameter that takes a gradient its metric has no graph
        try:
            for row, (true, other) in enumerate(self.pairs.answers.tolist()):
                metric = lambda logits, true=true, other=other: logits[0, -1, true] - logits[0, -1, other]
                result = attribution_patch(self.lens, clean[row : row + 1], corrupt[row : row + 1], metric)
                effects = dict.fromkeys(self._attributed(), 0.0)
                for node, score in result.node_scores.items():
                    if (node.kind, node.layer, node.head) in effects:
                        effects[node.kind, node.layer, node.head] += score  # over positions
                found.append(list(effects.values()))
        finally:
            self.lens.embed.requires_grad_(False)
            self.lens.zero_grad()
        return torch.tensor(found).T.double()

    def _attributed(self) -> list[tuple]:
        heads = [[("attn_head_out", layer, head) for head in range(self.model.n_heads)] for layer in range(self.model.n_layers)]
        return [node for layer, own in enumerate(heads) for node in (*own, ("mlp_out", layer, None))]

    @torch.no_grad()
    def _cache(self, prompts):
        return self.lens.run_with_cache(prompts.tokens)[1]

    @torch.no_grad()
    def _run(self, hooks: list) -> torch.Tensor:
        return self._ld(self.lens.run_with_hooks(self.pairs.corrupted.tokens, fwd_hooks=hooks))

    @torch.no_grad()
    def _sweep(self, sweep, tokens: torch.Tensor, clean) -> torch.Tensor:
        """One of its sweeps over two axes, flattened."""
        with redirect_stderr(io.StringIO()):  # its progress bars
            return sweep(self.lens, tokens, clean, self._ld, reduce="none").values.flatten(0, 1).double()

    def _ld(self, logits: torch.Tensor) -> torch.Tensor:
        return measure(logits[:, -1], self.pairs.answers)["ld"]


def _head(head: int, cache, z: torch.Tensor, hook) -> torch.Tensor:
    z[:, :, head] = cache[hook.name][:, :, head]
    return z


def _but_heads(heads: list[int], cache, z: torch.Tensor, hook) -> torch.Tensor:
    frozen = cache[hook.name].clone()
    frozen[:, :, heads] = z[:, :, heads]
    return frozen


def _whole(cache, value: torch.Tensor, hook) -> torch.Tensor:
    return cache[hook.name]


def _given(new: torch.Tensor, value: torch.Tensor, hook) -> torch.Tensor:
    return new
