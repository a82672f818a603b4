"""Path patching: what a component does for the answer along some paths only, exactly, without a pass a sender.

In the run on the corrupted prompt a *sender*'s output is set to its value on the clean prompt, and the change
is let through to a *receiver* along the allowed paths only; whatever else could carry it keeps its corrupted
value (arXiv 2211.00593, 2304.05969; spec section 3.2, denoising). With LD = logit(true) − logit(counterfactual)

    score = (LD_patched − LD_corrupt) / (LD_clean − LD_corrupt)        0: does nothing, 1: restores the clean run

1. `head_paths`: every head → logits, past later MLPs, all other attention frozen. Nothing then moves between
   positions: of a pass only the last token and the MLPs above the sender are left, with all heads side by side
   in the batch. What a head writes comes from its block's output matrix, and Gemma2's norm behind it.
2. `receiver_paths`: every MLP → what the chosen heads read, straight along the residual. The receiver is the
   residual before the lowest of these heads, as in the paper (whose layers 20, 25 and 14 are constants; here
   they follow from the heads), or the query, key and value inputs of the heads themselves.

The model's own modules do the computing. A sender that changes nothing runs along in every batch: if it does
not give LD_corrupt, the architecture is not understood, and `TracingError` says so.

The columns of the tables are in `helpers.localization.path_tables`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import pandas as pd
import torch

from helpers.chunks import over_prompts
from helpers.interventions import Intervention
from helpers.localization.counterfactual import Pairs
from helpers.localization.engine import Known, Memory, Run, flush_right
from helpers.localization.patching import by_distance
from helpers.localization.path_tables import lay_out, projections
from helpers.localization.recovery import measure
from helpers.models import Component, Model
from helpers.sites import TracingError

MLP_ELEMENTS = 2**24  # hidden activations of an MLP that are held at a time


def head_paths(model: Model, pairs: Pairs, batch_size: int = 64) -> pd.DataFrame:
    """Every head → logits at the last token, through later MLPs, with all other attention frozen."""

    def work(part: _Part) -> torch.Tensor:
        heads = torch.arange(model.n_heads)

        def attention(layer: int, active: int) -> torch.Tensor:
            z = part.last("head", layer).repeat(model.n_heads, 1, 1, 1)
            z[heads, :, heads] = part.clean["head", layer][:, -1].transpose(0, 1)
            return torch.cat([part.last("attn_out", layer).expand(active, -1, -1), part.attention_out(layer, z)])

        return part.climb(0, attention)

    return _table(model, pairs, model.components("head"), batch_size, work)


def receiver_paths(
    model: Model,
    pairs: Pairs,
    heads: Sequence[str | Component],
    receiver: str = "residual",
    inputs: str = "qkv",
    above: str | None = None,
    senders: Sequence[str | Component] | None = None,
    positions: str = "all",
    apart: bool = False,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Every MLP → what these heads read, along the residual alone; a sender above all of them scores 0.

    Args:
        receiver: `"residual"`: the residual before the lowest of the heads, at every position; `"heads"`: the
            inputs of each of the heads, of which `inputs` names some of `q`, `k` and `v`.
        above: what the receivers' change passes through on its way to the logits: `"all"` that lies above them,
            which is the paper's way and the default for the residual; `"mlps"`, later MLPs at the last token
            alone, as in `head_paths`, the default for heads; `"nothing"`: the change is measured at the
            receivers. Columns are then `effect`, its projection on the change from corrupted to clean, `total`,
            that change's own square, and `score`, their ratio. Taken at the residual of all positions, or at the
            heads' outputs at the last token.
        senders: MLPs, heads or attention blocks; all MLPs when left out.
        positions: where the senders are patched: `"all"`, `"subject"`, `"subject_last"` or `"last"`.
        apart: each of the heads is a receiver of its own, named in the column `receiver`; not with `"nothing"` above.
    """
    heads, senders = _components(heads), _components(model.components("mlp") if senders is None else senders)
    above = above or {"residual": "all", "heads": "mlps"}.get(receiver)
    ways = {"residual": ("all", "nothing"), "heads": ("mlps", "all", "nothing")}
    if above not in ways.get(receiver, ()) or not inputs or not set(inputs) <= set("qkv"):
        raise TracingError(f"receiver {receiver!r}, above {above!r}, inputs {inputs!r}: there are {ways} and q, k, v")
    if not heads or any(head.kind != "head" or head not in model.components("head") for head in heads):
        raise TracingError(f"receivers {', '.join(map(str, heads)) or 'none'}: name heads of the model, as 'head 5.2'")
    if apart and (receiver != "heads" or above == "nothing"):
        raise TracingError(f"apart goes with receiver 'heads' and what lies above them, not with {receiver!r} and {above!r}")
    groups = [_by_layer([head]) for head in heads] if apart else [_by_layer(heads)]
    lowest = min(groups[0])

    def at_residual(part: _Part) -> torch.Tensor:
        changes = [part.write(sender, positions) if sender.layer < lowest else None for sender in senders]
        if above == "nothing":
            full = part.clean["resid_pre", lowest] - part.corrupt["resid_pre", lowest]
            return projections(part.within(full, "all"), changes)
        add = partial(Intervention, "resid_pre", lowest, "all", op="add")
        return part.differences([] if change is None else [add(value=change)] for change in changes)

    def at_heads(part: _Part, by_layer: dict[int, list[int]]) -> torch.Tensor:
        found: dict[int, list[torch.Tensor]] = {layer: [] for layer in by_layer}
        last = above != "all"
        for sender in senders:
            change = part.write(sender, positions)
            for layer, own in by_layer.items():
                z = part.receive(layer, change, inputs, last) if sender.layer < layer else part.corrupt["head", layer]
                found[layer].append(z[:, -1:, own] if last else z[:, :, own])
        received = {layer: torch.stack(z) for layer, z in found.items()}  # (senders, b, p or 1, chosen heads, d_head)
        if above == "all":
            return part.differences(
                [Intervention("head", layer, "all", z[i], heads=by_layer[layer]) for layer, z in received.items()]
                for i in range(len(senders))
            )
        if above == "nothing":
            base, full = (
                torch.cat([run["head", layer][:, -1, own].flatten(1) for layer, own in by_layer.items()], dim=-1)
                for run in (part.corrupt, part.clean)
            )
            z = torch.cat([z[:, :, -1].flatten(2) for z in received.values()], dim=-1)
            return projections(full - base, z - base)

        def attention(layer: int, active: int) -> torch.Tensor:
            frozen = part.last("attn_out", layer).expand(active, -1, -1)
            if layer not in received:
                return frozen
            z = part.last("head", layer).repeat(len(senders), 1, 1, 1)
            z[:, :, by_layer[layer]] = received[layer][:, :, -1]
            return torch.cat([frozen[:1], part.attention_out(layer, z)])

        return part.climb(min(by_layer), attention)

    def at_groups(part: _Part) -> torch.Tensor:
        first, *others = (at_heads(part, by_layer) for by_layer in groups)
        return torch.cat([first, *(values[1:] for values in others)])

    if receiver == "residual":
        return _table(model, pairs, senders, batch_size, at_residual, above == "nothing")
    table = _table(model, pairs, senders * len(groups), batch_size, at_groups, above == "nothing")
    return table.assign(receiver=[str(head) for head in heads for _ in range(len(senders) * len(pairs))]) if apart else table


def _components(names: Sequence[str | Component]) -> list[Component]:
    return [Component.parse(name) if isinstance(name, str) else name for name in names]


def _by_layer(heads: Sequence[Component]) -> dict[int, list[int]]:
    """Layer → numbers of the heads in it, ascending."""
    layers = sorted({head.layer for head in heads})
    return {layer: sorted({head.head for head in heads if head.layer == layer}) for layer in layers}


class _Part:
    """The clean and the corrupted run of some pairs, and what can be computed again on top of the latter."""

    def __init__(self, model: Model, pairs: Pairs):
        self.model, self.answers = model, pairs.answers.to(model.unembed.weight.device)
        keep = ("head", "attn_out", "mlp_out")
        self.clean = Run(model, flush_right(pairs.clean), keep)
        self.corrupt = Run(model, flush_right(pairs.corrupted), keep)

    def last(self, site: str, layer: int) -> torch.Tensor:
        """The corrupted run's activation at the last token, (1, b, *features)."""
        return self.corrupt[site, layer][:, -1].unsqueeze(0)

    def write(self, sender: Component, positions: str) -> torch.Tensor:
        """By how much a sender's clean output changes the residual above it, (b, p, d_model)."""
        site = "head" if sender.kind == "head" else f"{sender.kind}_out"
        clean, corrupt = self.clean[site, sender.layer], self.corrupt[site, sender.layer]
        if sender.kind != "head":
            change = clean - corrupt
        elif self.model.attn_post_norm(sender.layer) is None:  # the head's own columns of the output matrix suffice
            own = slice(sender.head * self.model.d_head, (sender.head + 1) * self.model.d_head)
            weight = self.model.matrix("o", sender.layer)[0]
            change = (clean[:, :, sender.head] - corrupt[:, :, sender.head]) @ weight[:, own].T
        else:
            z = corrupt.clone()
            z[:, :, sender.head] = clean[:, :, sender.head]
            change = self.attention_out(sender.layer, z) - self.corrupt["attn_out", sender.layer]
        return self.within(change, positions)

    def within(self, change: torch.Tensor, positions: str) -> torch.Tensor:
        """The change at these positions, 0 elsewhere. (On padding the two runs differ too, without consequence.)"""
        return change * self.corrupt.batch.at(positions).unsqueeze(-1).to(change.device)

    def receive(self, layer: int, change: torch.Tensor, inputs: str, last: bool) -> torch.Tensor:
        """Outputs (b, p, n_heads, d_head) of a layer's heads if the residual they read changes, for these inputs.

        p is 1 if only the `last` token is wanted.
        """
        norm, before = self.model.attn_norm(layer), self.corrupt["resid_pre", layer]
        seen: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for kind in set("qkv") - set(inputs):
                module, rows = self.model.part(kind, layer), self.model.matrix(kind, layer)[1]
                freeze = partial(_freeze, module(norm(before)), slice(None) if rows is None else rows)
                hooks.callback(module.register_forward_hook(freeze).remove)
            hooks.callback(self.model.part("o", layer).register_forward_pre_hook(partial(_end, seen)).remove)
            self._attend(layer, norm(before + change), last)
        return seen[0].unflatten(-1, (self.model.n_heads, -1))

    def _attend(self, layer: int, read: torch.Tensor, last: bool) -> None:
        """Run an attention on what it reads, for the `last` query alone once all keys and values are known."""
        attention, rows, memory, stop = self.model.attention(layer), torch.arange(len(read)), Memory(), read.shape[1]

        def run(columns: slice) -> None:
            tokens = read[:, columns].contiguous()  # products with a strided slice would be slow
            with suppress(Known):
                attention(hidden_states=tokens, **self.corrupt.given(layer, rows, columns, memory))

        if last and stop > 1:
            memory.suffices = True
            with self._one_query(layer, stop - 1):
                run(slice(0, stop - 1))
            memory.suffices = False
        run(slice(stop - 1 if last else 0, stop))

    @contextmanager
    def _one_query(self, layer: int, length: int) -> Iterator[None]:
        """Within the block a layer computes one query, of one head, in place of `length` that nobody wants, where queries are a module of their own."""
        with ExitStack() as hooks:
            if self.model.matrix("q", layer)[1] is None:
                query, own = self.model.part("q", layer), self.model.d_head
                hooks.callback(query.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :1].contiguous(),)).remove)
                hooks.callback(query.register_forward_hook(lambda _, __, output: output[..., :own].expand(-1, length, -1)).remove)
            yield

    def attention_out(self, layer: int, z: torch.Tensor) -> torch.Tensor:
        """What an attention adds to the residual when its heads give z (…, n_heads, d_head)."""
        out, norm = self.model.part("o", layer)(z.flatten(-2)), self.model.attn_post_norm(layer)
        return out if norm is None else norm(out)

    def mlp_out(self, layer: int, residual: torch.Tensor) -> torch.Tensor:
        """What an MLP adds to residuals (…, d_model), some tokens at a time."""
        norm, mlp, after = self.model.mlp_norm(layer), self.model.mlp(layer), self.model.mlp_post_norm(layer)
        tokens = residual.flatten(0, -2).split(max(1, MLP_ELEMENTS // self.model.d_mlp))
        out = torch.cat([mlp(norm(some)) for some in tokens])
        return (out if after is None else after(out)).view(residual.shape)

    def climb(self, start: int, attention: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """LD (variants, b) after going up the last token's residual from a layer on, attention being given.

        `attention(layer, active)` is what attention writes for each variant, (active or more, b, d_model):
        those beyond the `active` ones so far set out from the first, which is the corrupted run itself.
        """
        residual = self.last("resid_pre", start)
        for layer in range(start, self.model.n_layers):
            written = attention(layer, len(residual))
            residual = torch.cat([residual, residual[:1].expand(len(written) - len(residual), -1, -1)])
            written = written.to(residual.device)
            read = residual if self.model.parallel else residual + written
            residual = residual + written + self.mlp_out(layer, read).to(residual.device)
        hidden = self.model.final_norm(residual)
        rows, bias, cap = self.model.unembed.weight[self.answers], self.model.unembed.bias, self.model.final_softcap
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = torch.einsum("vbd,bkd->vbk", hidden.to(wide), rows.to(wide))
        if bias is not None:
            logits = logits + bias[self.answers]
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return logits[..., 0] - logits[..., 1]

    def differences(self, edits: Iterable[list[Intervention]]) -> torch.Tensor:
        """LD (1 + edits, b) of the corrupted run, and of it with each list of interventions."""
        logits = [self.corrupt.logits, *map(self.corrupt.edited, edits)]
        return torch.stack([measure(one, self.answers)["ld"] for one in logits])


def _end(seen: list[torch.Tensor], module, inputs: tuple) -> None:
    """A hook before a module that notes what it reads, and runs nothing more."""
    seen.append(inputs[0])
    raise Known


def _freeze(frozen: torch.Tensor, rows, module, inputs, output: torch.Tensor) -> torch.Tensor:
    """A hook that puts earlier values back into some features of an output, of which a part of the positions is computed."""
    n, output = output.shape[1], output.clone()
    output[..., rows] = (frozen[:, -1:] if n == 1 else frozen[:, :n])[..., rows]
    return output


def _table(model, pairs: Pairs, senders, batch_size: int, work, projected: bool = False) -> pd.DataFrame:
    """Run `work` in chunks and lay out its values (1 + senders, rows); the first is the corrupted run's, or a total."""

    @torch.no_grad()
    def chunk(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        part = _Part(model, pairs[rows])
        values = work(part).double().cpu()
        clean, corrupt = (measure(run.logits, part.answers)["ld"] for run in (part.clean, part.corrupt))
        if not projected:
            _check(values[0], corrupt, part)
        return rows, values, clean

    chunks = over_prompts(chunk, model, pairs.clean, batch_size, by_distance(pairs.clean))
    rows, values, clean = (torch.cat(parts, dim=-1) for parts in zip(*chunks))
    back = torch.argsort(rows)
    return lay_out(pairs, senders, values[:, back], clean[back], projected)


def _check(control: torch.Tensor, corrupt: torch.Tensor, part: _Part) -> None:
    """Whether the sender that changes nothing gives the corrupted run, up to the rounding of the model's dtype."""
    rounding = 50 * torch.finfo(part.model.dtype).eps * part.corrupt.logits.abs().max().item()
    off = (control - corrupt).abs().max().item()
    if not off <= rounding:
        raise TracingError(
            f"{part.model.name}: a path that changes nothing moves the logit difference by {off:.2g}; its blocks "
            "compute something that path patching does not know of"
        )
