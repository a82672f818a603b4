"""Read and edit activations; the only file, beside `helpers.remote`, that speaks nnsight.

    trace = read(model, prompts, [("resid_post", 3)], positions="subject_last")
    trace.logits, trace["resid_post", 3]                       # (n, vocab), (n, d_model)

    patch = Intervention("resid_post", 3, "subject_last", value=other["resid_post", 3])
    intervene(model, prompts, [patch]).logits

    knock_out_attention(model, prompts, layers=[4, 5], queries="last", keys="subject").logits

Sites and positions are explained in `helpers.sites`, edits in `helpers.interventions`. What no
notebook should have to know is done here, once:

- **Which object is the activation.** With transformers 5 a block returns a tensor and an attention a
  tuple, so the `output[0]` of older tutorials now means row 0 of the batch. `_Tap` alone takes a
  module's value apart, and checks the shape of what it finds.
- **Whether an edit took effect.** After each edit the activation is fetched again from the pass and
  compared with what was meant: changed as asked, and bit for bit the same everywhere else.
- **Forward order.** nnsight runs edits in step with the model: they must come in the modules' order.

nnsight wraps the bare module, without a tokenizer, whose padding side it would change. It leaves a wrapper
around each `forward`, which does nothing outside a trace; deep copies and saved models are free of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from nnsight import NNsight

from helpers.interventions import Edit, Intervention, KnockOut
from helpers.models import Model
from helpers.sites import Batch, Step, TracingError, feature_shape, place

__all__ = ["Intervention", "KnockOut", "Trace", "TracingError", "gradients", "intervene", "knock_out_attention", "read"]


@dataclass(frozen=True, eq=False)
class Trace:
    """What a pass gave.

    `logits` (n, vocab_size), at least float32, at the last real token of each row. `activations` by
    (site, layer), in the model's dtype, as they were after any intervention; `trace[site, layer]` is
    the same. `changed` holds a number for each intervention: the largest absolute change that it made
    to the activation, or for a knock-out the number of attention edges cut that were open before.
    """

    logits: torch.Tensor
    activations: dict[tuple[str, int], torch.Tensor]
    changed: tuple[float, ...] = ()

    def __getitem__(self, site_layer: tuple[str, int]) -> torch.Tensor:
        if site_layer not in self.activations:
            raise TracingError(f"{site_layer} was not read; there are {list(self.activations)}")
        return self.activations[site_layer]


def read(
    model: Model,
    prompts,
    sites: Sequence[tuple[str, int]] = (),
    positions: str | torch.Tensor | None = None,
    batch_size: int = 64,
) -> Trace:
    """Logits and activations of an unedited pass.

    `prompts` is a `PromptSet`; `sites` are (site, layer) pairs. `positions` None gives every position,
    padding included, (n, length, *features); `"last"`, `"subject_first"`, `"subject_last"` or an int64
    tensor (n,) one a row, (n, *features). For `attn_pattern` the positions are those of the queries,
    giving (n, n_heads, query, key) or (n, n_heads, key). Raises `TracingError`.
    """
    return intervene(model, prompts, (), sites, positions, batch_size)


def intervene(
    model: Model,
    prompts,
    interventions: Sequence[Intervention | KnockOut],
    read: Sequence[tuple[str, int]] = (),
    positions: str | torch.Tensor | None = None,
    batch_size: int = 64,
) -> Trace:
    """Logits, and the activations named in `read`, of a pass with interventions.

    All happen in one pass, so later layers see the effect of earlier ones; several at one site and layer
    are applied in the order given. `read` and `positions` are as in the function `read`. Model and prompts
    are not changed. Raises `TracingError` naming site, layer and shape where an intervention does not fit,
    or did not take effect.
    """
    whole = Batch.of(prompts)
    edits = _prepare_all(model, whole, interventions, batch_size)
    for site, layer in read:
        place(model, site, layer)
    index = None if positions is None else whole.index(positions)
    logits, kept, changed = [], {pair: [] for pair in read}, []
    for rows in whole.chunks(batch_size):
        step = _Pass(model, whole, rows, edits, read, index)
        step.run()
        logits.append(step.logits)
        changed.append(step.changed)
        for pair, parts in kept.items():
            parts.append(step.kept[pair])
    combine = [sum if isinstance(edit, KnockOut) else max for edit in edits]
    return Trace(
        logits=torch.cat(logits),
        activations={pair: torch.cat(parts) for pair, parts in kept.items()},
        changed=tuple(float(join(values)) for join, values in zip(combine, zip(*changed))),
    )


def knock_out_attention(
    model: Model,
    prompts,
    layers: Sequence[int],
    queries: str | torch.Tensor,
    keys: str | torch.Tensor,
    heads: Sequence[int] | None = None,
    read: Sequence[tuple[str, int]] = (),
    positions: str | torch.Tensor | None = None,
    batch_size: int = 64,
) -> Trace:
    """A pass in which attention from `queries` to `keys` is cut in each of `layers`.

    The cut is made before the softmax, so the remaining attention is renormalised. All heads, or those
    in `heads`. Raises `TracingError` if some query would be left without any key to attend to.
    """
    cuts = [KnockOut(layer, queries, keys, heads) for layer in layers]
    return intervene(model, prompts, cuts, read, positions, batch_size)


def gradients(
    model: Model,
    prompts,
    sites: Sequence[tuple[str, int]],
    metric: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    interventions: Sequence[Intervention | KnockOut] = (),
    batch_size: int = 64,
) -> tuple[torch.Tensor, dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]]:
    """A metric of the logits, and its gradient with respect to activations.

    `metric(logits, rows)` gets the logits (b, vocab_size), at least float32, at the last real token of the
    prompts with the numbers `rows` (b,), and returns one value for each, (b,). Rows do not influence
    each other, so the gradient of the sum holds each row's own. Interventions are applied first, as
    for integrated gradients, which moves the embeddings step by step.

    Returns the metric (n,) and for each site the pair (activation, gradient), both
    (n, length, *features). Parameters collect no gradient. Raises `TracingError`.
    """
    whole = Batch.of(prompts)
    edits = _prepare_all(model, whole, interventions, batch_size)
    for site, layer in sites:
        place(model, site, layer)
        if site == "attn_pattern":
            raise TracingError("attn_pattern is read only: take gradients at `head` or `attn_out`")
    values, collected = [], {pair: ([], []) for pair in sites}
    for rows in whole.chunks(batch_size):
        step = _Pass(model, whole, rows, edits, sites, track=True)
        step.run()
        value = metric(step.logits, rows.to(step.logits.device))
        if value.shape != rows.shape:
            raise TracingError(f"metric returned {tuple(value.shape)}, one value a row is ({len(rows)},)")
        grads = torch.autograd.grad(value.sum(), [step.kept[pair] for pair in sites], materialize_grads=True)
        values.append(value.detach())
        for pair, grad in zip(sites, grads):
            collected[pair][0].append(step.kept[pair].detach())
            collected[pair][1].append(grad)
    return torch.cat(values), {pair: (torch.cat(a), torch.cat(g)) for pair, (a, g) in collected.items()}


def _prepare_all(model: Model, whole: Batch, interventions, batch_size: int) -> list[Edit | KnockOut]:
    """Check every intervention; values of `mean` and `resample` come from one unedited pass."""
    for edit in interventions:
        place(model, edit.site, edit.layer)
    pairs = sorted({(edit.site, edit.layer) for edit in interventions if edit.needs_clean})
    clean = read(model, whole, pairs, batch_size=batch_size).activations if pairs else {}
    return [edit.prepare(model, whole, clean.get((edit.site, edit.layer))) for edit in interventions]


class _Tap:
    """The activation at one site of a running pass: fetch it, or put another in its stead."""

    def __init__(self, view: NNsight, model: Model, site: str, layer: int, batch: Batch):
        step, role = place(model, site, layer)
        self.module = view.get(model.path(role, layer))
        self.is_input = step in (Step.BLOCK_IN, Step.HEADS, Step.NEURONS)
        self.label = f"{site} at layer {layer}"
        self.site = site
        n, length = batch.tokens.shape
        pattern = (n, model.n_heads, length, length)
        self.shape = pattern if site == "attn_pattern" else (n, length, *feature_shape(model, site))
        # heads lie side by side in the model's own tensor
        self.stored_shape = (n, length, model.n_heads * model.d_head) if site == "head" else self.shape

    def fetch(self) -> torch.Tensor:
        value = self.module.input if self.is_input else self.module.output
        if isinstance(value, tuple):
            value = value[1 if self.site == "attn_pattern" else 0]
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        if found != self.stored_shape:
            raise TracingError(f"{self.label}: found {found} in the model, expected {self.stored_shape}")
        return value.reshape(self.shape)

    def put(self, tensor: torch.Tensor) -> None:
        tensor = tensor.reshape(self.stored_shape)
        if self.is_input:
            self.module.input = tensor
        else:
            value = self.module.output
            self.module.output = (tensor, *value[1:]) if isinstance(value, tuple) else tensor


class _Pass:
    """One forward pass over some rows. After `run` it holds what a `Trace` does; with `track`, gradients
    flow from the logits to `kept`."""

    def __init__(self, model: Model, whole: Batch, rows: torch.Tensor, edits, reads, index=None, track=False):
        self.model, self.rows, self.edits, self.track = model, rows, edits, track
        self.reads = list(dict.fromkeys(reads))
        self.batch = whole[rows].to(model.device)
        self.index = None if index is None else index[rows]
        self.kept: dict[tuple[str, int], torch.Tensor] = {}
        self.changed: list[torch.Tensor | int] = [0] * len(edits)

    def run(self) -> None:
        self.view = NNsight(self.model.hf)
        mask, positions = self.batch.mask.long(), self.batch.position_ids
        inputs = dict(input_ids=self.batch.tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        with torch.set_grad_enabled(self.track), self.view.trace(**inputs):
            for _, action, argument in self._agenda():
                action(argument)
            self._read_logits()

    def _agenda(self) -> list[tuple]:
        """(when, action, its argument) for all that happens, in forward order; edits before reads."""
        agenda = [((0, Step.BLOCK_IN, 1), self._start_graph, None)] if self.track else []
        for number, edit in enumerate(self.edits):
            if isinstance(edit, KnockOut):
                agenda.append(((edit.layer, Step.ATTENTION_IN, 0), self._cut, number))
                agenda.append(((edit.layer, Step.ATTENTION_OUT, 0), self._verify_cut, number))
            else:
                step, _ = place(self.model, edit.source.site, edit.source.layer)
                agenda.append(((edit.source.layer, step, 0), self._edit, number))
        for site, layer in self.reads:
            step, _ = place(self.model, site, layer)
            agenda.append(((layer, step, 2), self._keep, (site, layer)))
        return sorted(agenda, key=lambda entry: entry[0])

    def _tap(self, site: str, layer: int) -> _Tap:
        return _Tap(self.view, self.model, site, layer, self.batch)

    def _start_graph(self, _) -> None:
        # The parameters are frozen, so nothing needs a gradient until an activation does.
        tap = self._tap("resid_pre", 0)
        tap.put(tap.fetch().detach().requires_grad_())

    def _edit(self, number: int) -> None:
        edit = self.edits[number]
        tap = self._tap(edit.source.site, edit.source.layer)
        before = tap.fetch()
        tap.put(edit.apply(before, self.rows))
        self.changed[number] = edit.verify(before, tap.fetch(), self.rows)

    def _keep(self, pair: tuple[str, int]) -> None:
        tap = self._tap(*pair)
        value = tap.fetch()
        if self.index is None:
            value = value.clone()  # the model may go on to write into its own tensor
            if self.track:
                tap.put(value)  # so that the copy lies on the way to the logits
        else:
            every, column = torch.arange(len(self.rows)), self.index
            value = value[every, :, column] if pair[0] == "attn_pattern" else value[every, column]
        self.kept[pair] = value

    def _cut(self, number: int) -> None:
        cut = self.edits[number]
        attention = self.view.get(self.model.path("attention", cut.layer))
        positional, named = attention.inputs
        edges = cut.edges(self.rows, self.model.n_heads)
        mask, self.changed[number] = cut.close(named.get("attention_mask"), edges, self.rows)
        attention.inputs = (positional, {**named, "attention_mask": mask})

    def _verify_cut(self, number: int) -> None:
        cut = self.edits[number]
        pattern = self._tap("attn_pattern", cut.layer).fetch()
        if pattern[cut.edges(self.rows, self.model.n_heads).to(pattern.device)].any():
            raise TracingError(f"{cut}: attention {tuple(pattern.shape)} still flows along the edges that were cut")

    def _read_logits(self) -> None:
        # Only one position a row goes through the unembedding, the largest matrix of a small model.
        unembed = self.view.get(self.model.unembed_path)
        hidden = unembed.input
        rows, last = torch.arange(len(self.rows)), self.batch.last.to(hidden.device)
        unembed.input = hidden[rows, last].unsqueeze(1)
        logits = self.view.output.logits[:, 0]
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
