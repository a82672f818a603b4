"""Edited passes at the cost of what the edit changes, exact, in plain PyTorch.

    run = Run(model, flush_right(prompts), keep=("mlp_out",))
    run.logits, run["mlp_out", 3]                       # (n, vocab), (n, length, d_model)
    patch = Intervention("mlp_out", 3, "subject_last", value=other["mlp_out", 3])
    run.edited([patch])                                 # equals tracing.intervene(model, prompts, [patch]).logits

An edit at layer ℓ and position p leaves everything below ℓ, and at every layer everything before p, as it
was. So a `Run` remembers the residual before each block and the keys and values of each attention, and
an edited pass starts at block ℓ with the positions from p on, which attend to the remembered keys and
values of the earlier ones. An edit inside block ℓ (an attention, an MLP, a head) needs just the edited
positions in that block. In the last block only the last position is needed: the others run until their
keys and values are known. A cut of attention from the last position thus costs one position a layer.

Blocks are the model's own modules, called with the arguments that the model itself made for them in the
unedited pass (mask, window, rotary angles), with a stand-in for the cache of generation. So no family is
written down here a second time. `tracing.intervene` is the reference; tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial

import torch

from helpers.interventions import Edit, Intervention, KnockOut
from helpers.models import Model
from helpers.sites import Batch, Step, TracingError, feature_shape, place

INPUT_STEPS = (Step.BLOCK_IN, Step.HEADS, Step.NEURONS)
INPUT_OF_BLOCK = ("embed", "resid_pre")
POSITION_NUMBERS = {"position_ids", "cache_position"}
CACHE_NAMES = ("past_key_values", "layer_past", "cache")  # what blocks call the cache of generation


def flush_right(prompts) -> Batch:
    """The prompts with their padding on the left and no column of padding alone, as a `Run` wants them.

    `prompts` is a `PromptSet` or a `Batch`. Positions before a common end then share a column.
    """
    batch = Batch.of(prompts)
    width = batch.tokens.shape[1]
    shift = width - 1 - batch.last
    source = (torch.arange(width) - shift[:, None]) % width
    mask = batch.mask.gather(1, source)
    empty = int(mask.any(0).int().argmax())
    return Batch(
        tokens=batch.tokens.gather(1, source)[:, empty:],
        mask=mask[:, empty:],
        position_ids=batch.position_ids.gather(1, source).masked_fill(~mask, 0)[:, empty:],
        last=torch.full_like(batch.last, width - 1 - empty),
        subject=None if batch.subject is None else batch.subject + (shift - empty)[:, None],
    )


class Run:
    """One unedited pass over prompts, remembered so that edited passes are cheap.

    Args:
        batch: from `flush_right`: the last column is every row's last token.
        keep: sites to keep for reading at every layer (`attn_out`, `mlp_out`, `head`, `neuron`); the
            residual (`embed`, `resid_pre`, `resid_post`) is there in any case.
        embeds: (n, length, d_model), what the first block receives in place of the embeddings.

    `logits` is (n, vocab_size) at the last token, at least float32, and `run[site, layer]` is
    (n, length, *features). Raises `TracingError` for a batch that is not flush right or a block whose
    arguments are not understood.
    """

    @torch.no_grad()
    def __init__(self, model: Model, batch: Batch, keep: Sequence[str] = (), embeds: torch.Tensor | None = None):
        self.model, self.batch = model, batch
        self.length = batch.tokens.shape[1]
        if (batch.last != self.length - 1).any():
            raise TracingError("the last column is not every row's last token: pass the prompts through flush_right")
        self._embeds = embeds
        self._residual: list[torch.Tensor] = [None] * (model.n_layers + 1)
        self._arguments: list[dict] = [None] * model.n_layers
        self._memory = [Memory() for _ in range(model.n_layers)]
        self._kept: dict[tuple[str, int], torch.Tensor] = {}
        there = batch.to(model.device)
        with ExitStack() as hooks:
            for layer in range(model.n_layers):
                block = model.block(layer)
                handle = block.register_forward_pre_hook(partial(self._enter, layer), with_kwargs=True)
                hooks.callback(handle.remove)
                for site in keep:
                    hooks.callback(_attach(model, site, layer, partial(self._keep, site, layer)).remove)
            hooks.callback(model.final_norm.register_forward_pre_hook(self._leave).remove)
            logits = model.hf(
                input_ids=there.tokens,
                attention_mask=there.mask.long(),
                position_ids=there.position_ids,
                use_cache=False,
                logits_to_keep=1,
            ).logits[:, -1]
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    def __getitem__(self, pair: tuple[str, int]) -> torch.Tensor:
        site, layer = pair
        place(self.model, site, layer)
        if site in ("embed", "resid_pre", "resid_post"):
            return self._residual[layer + (site == "resid_post")]
        if pair not in self._kept:
            raise TracingError(f"{pair} was not kept in this run: name the site in keep")
        return self._kept[pair]

    @torch.no_grad()
    def edited(self, edits: Sequence[Intervention | KnockOut]) -> torch.Tensor:
        """Logits (n, vocab_size) at the last token of a pass with these edits, as `tracing.intervene` makes it.

        Rows that no edit touches have the logits of the unedited pass. Raises `TracingError` as there.
        """
        by_layer: dict[int, list[Edit | KnockOut]] = {}
        touched = torch.zeros_like(self.batch.mask)
        for edit in edits:
            place(self.model, edit.site, edit.layer)
            clean = self[edit.site, edit.layer] if edit.needs_clean else None
            ready = edit.prepare(self.model, self.batch, clean)
            by_layer.setdefault(edit.layer, []).append(ready)
            touched |= _columns(ready)
        rows = touched.any(1).nonzero().flatten()
        if not len(rows):
            return self.logits
        final = self._final(by_layer, rows, int(touched[rows].any(0).int().argmax()))
        if final is None:
            return self.logits
        logits = self.logits.clone()
        logits[rows.to(logits.device)] = self.unembed(final).to(logits.device, logits.dtype)
        return logits

    def unembed(self, residual: torch.Tensor) -> torch.Tensor:
        """Logits of final residuals (…, d_model), in the model's dtype: final norm, unembedding and cap."""
        logits, cap = self.model.unembed(self.model.final_norm(residual)), self.model.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def given(self, layer: int, rows: torch.Tensor, columns: slice, memory: Memory) -> dict:
        """What a block, and its attention, is called with by name, for these columns and all that is in the memory."""
        pick, given = self._pick(rows), dict(self._arguments[layer])
        given["attention_mask"] = _take(given["attention_mask"], pick)[:, :, columns, : columns.stop]
        given["position_embeddings"] = tuple(_take(part, pick)[:, columns] for part in given["position_embeddings"])
        for name in POSITION_NUMBERS & given.keys():
            given[name] = _take(given[name], pick)[..., columns] if given[name].ndim > 1 else given[name][columns]
        return given | {self._cache_name: memory}

    def _final(self, by_layer: dict[int, list], rows: torch.Tensor, start: int) -> torch.Tensor | None:
        """The last position's residual after the last block, (rows, d_model); None if no edit reaches it."""
        first, top = min(by_layer), self.model.n_layers - 1
        if any(_site(edit) in INPUT_OF_BLOCK for edit in by_layer[first]):
            stop = self.length
        else:  # inside a block, what is edited at one position stays there
            edited = torch.stack([_columns(edit)[rows].any(0) for edit in by_layer[first]]).any(0)
            stop = 1 + int(edited.nonzero().max())
            if first == top:
                if stop < self.length:
                    return None
                start = self.length - 1
        hidden = self._residual[first][self._pick(rows), start:stop]
        for layer in range(first, top):
            hidden = self._call(layer, hidden, rows, start, by_layer.get(layer, ()), self._earlier(layer, rows, start))
            if stop < self.length:
                rest = self._residual[layer + 1][self._pick(rows), stop:]
                hidden, stop = torch.cat([hidden, rest.to(hidden.device)], dim=1), self.length
        memory, edits = self._earlier(top, rows, start), by_layer.get(top, ())
        if hidden.shape[1] > 1:
            memory.suffices = True
            with suppress(Known):
                self._call(top, hidden[:, :-1], rows, start, edits, memory)
            memory.suffices = False
        return self._call(top, hidden[:, -1:], rows, self.length - 1, edits, memory)[:, -1]

    def _call(self, layer: int, hidden: torch.Tensor, rows: torch.Tensor, start: int, edits, memory: Memory):
        """Output of a block for the positions from `start` on; `hidden` (rows, positions, d_model) says how many."""
        stop = start + hidden.shape[1]
        columns = slice(start, stop)
        given = self.given(layer, rows, columns, memory)
        mask = given["attention_mask"]
        with ExitStack() as hooks:
            for edit in edits:
                if isinstance(edit, KnockOut):
                    cut = replace(edit, queries=edit.queries[:, columns], keys=edit.keys[:, :stop])
                    try:
                        mask, _ = cut.close(mask, cut.edges(rows, self.model.n_heads), rows)
                    except TracingError as error:
                        raise TracingError(f"{error} (position 0 is column {start} of the prompts, flush right)") from None
                else:
                    change = partial(_narrow(edit, columns).apply, rows=rows)
                    hooks.callback(_attach(self.model, _site(edit), layer, change).remove)
            return self.model.block(layer)(hidden, **given | {"attention_mask": mask})

    def _earlier(self, layer: int, rows: torch.Tensor, start: int) -> Memory:
        """The remembered keys and values of a layer before `start`."""
        full, pick = self._memory[layer], self._pick(rows)
        return Memory(full.keys[pick, :, :start], full.values[pick, :, :start])

    def _pick(self, rows: torch.Tensor) -> torch.Tensor | slice:
        """An index for the rows, which come in order; all of them without a copy."""
        return slice(None) if len(rows) == len(self.batch) else rows

    def _enter(self, layer: int, block, inputs: tuple, given: dict) -> tuple[tuple, dict]:
        """Before a block in the unedited pass: note what it is called with, and have its keys and values noted."""
        self._cache_name = next((name for name in CACHE_NAMES if name in given), None)
        mask = given.get("attention_mask")
        unknown = [
            name
            for name, value in given.items()
            if isinstance(value, torch.Tensor) and name not in POSITION_NUMBERS | {"attention_mask"}
        ]
        if len(inputs) != 1 or unknown or self._cache_name is None or "position_embeddings" not in given:
            raise TracingError(
                f"{type(block).__name__} is called with {len(inputs)} positional arguments and {', '.join(given)}: "
                "only blocks that take the residual, then mask, rotary angles and cache by name can be re-run"
            )
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
            raise TracingError(f"{type(block).__name__}: expected eager attention's mask (b, 1, query, key)")
        if layer == 0 and self._embeds is not None:
            inputs = (self._embeds.to(inputs[0]),)
        self._residual[layer] = inputs[0]
        self._arguments[layer] = given
        return inputs, given | {self._cache_name: self._memory[layer]}

    def _keep(self, site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        self._kept[site, layer] = value
        return value

    def _leave(self, norm, inputs: tuple) -> None:
        self._residual[-1] = inputs[0]


class Known(Exception):
    """Raised by hooks and stand-ins to end a block, or a part of it, of which nothing more is wanted."""


class Memory:
    """Stands in for transformers' cache in one call of one block: notes keys and values, (b, heads, p, d_head)."""

    def __init__(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None):
        self.keys, self.values = keys, values
        self.suffices = False  # whether to end the block once they are noted

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        if self.suffices:
            raise Known
        return keys, values


def _attach(model: Model, site: str, layer: int, change: Callable[[torch.Tensor], torch.Tensor]):
    """Hook `change` onto the activation (b, p, *features) at a site; returns the hook's handle."""
    step, role = place(model, site, layer)
    module, features = model.part(role, layer), feature_shape(model, site)

    def changed(value: torch.Tensor) -> torch.Tensor:
        if value.ndim != 3:
            raise TracingError(f"{site} at layer {layer}: found {tuple(value.shape)} in the model, expected (b, p, …)")
        return change(value.reshape(*value.shape[:2], *features)).reshape(value.shape)

    def on_input(_, inputs):
        return (changed(inputs[0]), *inputs[1:])

    def on_output(_, inputs, output):
        return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else changed(output)

    return module.register_forward_pre_hook(on_input) if step in INPUT_STEPS else module.register_forward_hook(on_output)


def _site(edit: Edit | KnockOut) -> str:
    return edit.site if isinstance(edit, KnockOut) else edit.source.site


def _columns(edit: Edit | KnockOut) -> torch.Tensor:
    """Where an edit acts, booleans (n, length); a cut acts at its queries."""
    return edit.queries if isinstance(edit, KnockOut) else edit.where


def _narrow(edit: Edit, columns: slice) -> Edit:
    """The same edit of an activation that has these columns only."""
    by_position = edit.value.ndim == edit.features + 2
    return replace(edit, where=edit.where[:, columns], value=edit.value[:, columns] if by_position else edit.value)


def _take(value: torch.Tensor, pick: torch.Tensor | slice) -> torch.Tensor:
    """Rows of an argument; a batch dimension of one stands for all rows."""
    return value if len(value) == 1 else value[pick]
