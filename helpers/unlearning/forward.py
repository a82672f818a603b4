"""Running part of a model, with the model's own code: from a residual on, up to a block, and prompts' common start once.

Blocks that are left out are replaced by the identity while the backbone runs, and what prompts begin with
is handed to it as a cache of keys and values through which gradients flow. So attention masks, rotary
positions, sliding windows and norms are the family's own. Without a common start the numbers are those of
a full pass, bit for bit when the batch is the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.models import Model


def hidden_states(model: Model, tokens: torch.Tensor, mask: torch.Tensor, start: int = 0, residual: torch.Tensor | None = None,
                  stop: int | None = None, shared: int = 0, recompute: bool = False) -> torch.Tensor:
    """(b, length, d_model): the final hidden states after the last norm, or with `stop` the residual before that block.

    With `residual`, the residual before block `start`, the embeddings and the blocks below are not run.
    With `shared`, the number of tokens that all rows begin with, these are run once, and only the others
    are returned, (b, length - shared, d_model). Rows are padded on the right. Gradients flow to whatever asks.
    With `recompute` a block keeps only its input for the backward pass and is run again there (gradient checkpointing):
    the same gradients for less memory and about a third more time. It goes without `shared`, whose keys and values
    would be noted a second time.
    """
    if recompute and shared:
        raise ValueError("hidden_states: recompute goes without a shared start")
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    key, whole = ("input_ids", tokens) if residual is None else ("inputs_embeds", residual)
    common = _Common() if shared else None
    names = inspect.signature(model.hf.base_model.forward).parameters
    cache = "cache" if "cache" in names else "past_key_values"  # transformers 5.24 renamed it

    def run(rows: slice, columns: slice) -> torch.Tensor:
        inputs = {key: whole[rows, columns], "attention_mask": mask[rows, : columns.stop], "position_ids": positions[rows, columns]}
        return model.hf.base_model(**inputs, **{cache: common}, use_cache=False).last_hidden_state

    start = 0 if residual is None else start
    run_again = range(start, model.n_layers if stop is None else stop) if recompute else ()
    with _without(model, start, stop), _recomputed(model, run_again):
        if shared:
            run(slice(1), slice(shared))
            common.length = shared
        return run(slice(None), slice(shared, None))


def logits_of(model: Model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of final hidden states (..., d_model), at least fp32, with the family's cap on them."""
    logits = model.unembed(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if model.final_softcap is not None:
        logits = torch.tanh(logits / model.final_softcap) * model.final_softcap
    return logits


def layer_of(model: Model, name: str) -> int:
    """The block that owns a parameter; -1 for the embeddings, n_layers for what comes after the blocks."""
    if name.startswith(f"{model.blocks_path}."):
        return int(name[len(model.blocks_path) + 1:].split(".")[0])
    return -1 if name.startswith(f"{model.embed_path}.") else model.n_layers


class _Common:
    """Stands in for transformers' cache: notes the keys and values (1, heads, length, d_head) of the first pass, then
    puts them before those of each row of the second."""

    def __init__(self):
        self.length = 0
        self._noted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.length:
            self._noted[layer] = keys, values
            return keys, values
        before = (noted.expand(len(keys), -1, -1, -1) for noted in self._noted[layer])
        return tuple(torch.cat(pair, dim=2) for pair in zip(before, (keys, values)))

    def get_seq_length(self, *_) -> int:
        return self.length

    get_query_offset = get_seq_length

    def get_mask_sizes(self, n_queries: int, *_) -> tuple[int, int]:
        """(number of keys, index of the first): all keys are there, also under a sliding window."""
        return self.length + n_queries, 0


@contextmanager
def only(model: Model, layers: Sequence[int]) -> Iterator[None]:
    """The other blocks do nothing."""
    with _instead({model.block(l): _identity for l in range(model.n_layers) if l not in layers}):
        yield


@contextmanager
def _without(model: Model, start: int, stop: int | None) -> Iterator[None]:
    """Only blocks from `start` to before `stop` do something; with `stop`, the final norm does not either."""
    left_out = [model.block(l) for l in range(model.n_layers) if l < start or (stop is not None and l >= stop)]
    if stop is not None:
        left_out.append(model.final_norm)
    with _instead({module: _identity for module in left_out}):
        yield


@contextmanager
def _recomputed(model: Model, layers: Sequence[int]) -> Iterator[None]:
    """These blocks keep nothing but their input for the backward pass."""
    blocks = [model.block(layer) for layer in layers]
    with _instead({block: partial(checkpoint, block.forward, use_reentrant=False) for block in blocks}):
        yield


@contextmanager
def _instead(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Modules with other forward functions."""
    # some libraries wrap `forward` on the instance; what was there comes back
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            _set_forward(module, forward)


def _identity(hidden_states: torch.Tensor, *_, **__) -> torch.Tensor:
    return hidden_states


def _set_forward(module: nn.Module, forward) -> None:
    if forward is not None:
        module.forward = forward
    elif "forward" in vars(module):
        del module.forward
