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

Tables have one row a sender and fact: `subject`, `relation`, `counterfactual` (the partner), `component`,
`layer`, `head`, `ld_clean`, `ld_corrupt`, `ld_patched` and `score`, which is NaN for a fact whose two runs
hardly differ; a sender's score over facts is the ratio of means (`evidence.component_scores`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial

import pandas as pd
import torch

from helpers.chunks import over_rows
from helpers.interventions import Intervention
from helpers.localization.counterfactual import Pairs
from helpers.localization.engine import CACHE_NAMES, Run, flush_right
from helpers.localization.patching import by_distance
from helpers.localization.recovery import SMALLEST_GAP, describe, measure
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
    """
    heads, senders = _components(heads), _components(model.components("mlp") if senders is None else senders)
    above = above or {"residual": "all", "heads": "mlps"}.get(receiver)
    ways = {"residual": ("all", "nothing"), "heads": ("mlps", "all", "nothing")}
    if above not in ways.get(receiver, ()) or not inputs or not set(inputs) <= set("qkv"):
        raise TracingError(f"receiver {receiver!r}, above {above!r}, inputs {inputs!r}: there are {ways} and q, k, v")
    if not heads or any(head.kind != "head" or head not in model.components("head") for head in heads):
        raise TracingError(f"receivers {', '.join(map(str, heads)) or 'none'}: name heads of the model, as 'head 5.2'")
    layers = sorted({head.layer for head in heads})
    by_layer = {layer: sorted({head.head for head in heads if head.layer == layer}) for layer in layers}
    lowest = min(by_layer)

    def at_residual(part: _Part) -> torch.Tensor:
        changes = [part.write(sender, lowest, positions) for sender in senders]
        if above == "nothing":
            full = part.clean["resid_pre", lowest] - part.corrupt["resid_pre", lowest]
            return _projections(part.within(full, "all"), changes)
        add = partial(Intervention, "resid_pre", lowest, "all", op="add")
        return part.differences([] if change is None else [add(value=change)] for change in changes)

    def at_heads(part: _Part) -> torch.Tensor:
        received = {  # layer -> (senders, b, p, chosen heads, d_head)
            layer: torch.stack(
                [part.receive(layer, part.write(sender, layer, positions), inputs)[:, :, own] for sender in senders]
            )
            for layer, own in by_layer.items()
        }
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
            return _projections(full - base, z - base)

        def attention(layer: int, active: int) -> torch.Tensor:
            frozen = part.last("attn_out", layer).expand(active, -1, -1)
            if layer not in received:
                return frozen
            z = part.last("head", layer).repeat(len(senders), 1, 1, 1)
            z[:, :, by_layer[layer]] = received[layer][:, :, -1]
            return torch.cat([frozen[:1], part.attention_out(layer, z)])

        return part.climb(lowest, attention)

    work = at_residual if receiver == "residual" else at_heads
    watched = by_layer if receiver == "heads" else ()
    return _table(model, pairs, senders, batch_size, work, watched, projected=above == "nothing")


def _components(names: Sequence[str | Component]) -> list[Component]:
    return [Component.parse(name) if isinstance(name, str) else name for name in names]


def _projections(full: torch.Tensor, changes: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """First the square of the full change (b,), then the projection of each change on it: (1 + changes, b)."""
    full = full.flatten(1).double()
    parts = [full, *(0 * full if change is None else change.flatten(1).double() for change in changes)]
    return torch.stack([(part * full).sum(-1) for part in parts])


class _Part:
    """The clean and the corrupted run of some pairs, and what can be computed again on top of the latter."""

    def __init__(self, model: Model, pairs: Pairs, watched: Iterable[int]):
        self.model, self.answers = model, pairs.answers.to(model.unembed.weight.device)
        keep = ("head", "attn_out", "mlp_out")
        self.clean = Run(model, flush_right(pairs.clean), keep)
        self.given: dict[int, dict] = {}  # layer -> what its attention is called with
        with ExitStack() as hooks:
            for layer in watched:
                note = partial(self._note, layer)
                hooks.callback(model.attention(layer).register_forward_pre_hook(note, with_kwargs=True).remove)
            self.corrupt = Run(model, flush_right(pairs.corrupted), keep)

    def _note(self, layer: int, module, inputs: tuple, given: dict) -> None:
        self.given[layer] = {name: v for name, v in given.items() if name not in ("hidden_states", *CACHE_NAMES)}

    def last(self, site: str, layer: int) -> torch.Tensor:
        """The corrupted run's activation at the last token, (1, b, *features)."""
        return self.corrupt[site, layer][:, -1].unsqueeze(0)

    def write(self, sender: Component, layer: int, positions: str) -> torch.Tensor | None:
        """By how much a sender's clean output changes the residual before a layer above it, (b, p, d_model)."""
        if sender.layer >= layer:
            return None
        if sender.kind == "head":
            z = self.corrupt["head", sender.layer].clone()
            z[:, :, sender.head] = self.clean["head", sender.layer][:, :, sender.head]
            change = self.attention_out(sender.layer, z) - self.corrupt["attn_out", sender.layer]
        else:
            site = f"{sender.kind}_out"
            change = self.clean[site, sender.layer] - self.corrupt[site, sender.layer]
        return self.within(change, positions)

    def within(self, change: torch.Tensor, positions: str) -> torch.Tensor:
        """The change at these positions, 0 elsewhere. (On padding the two runs differ too, without consequence.)"""
        return change * self.corrupt.batch.at(positions).unsqueeze(-1).to(change.device)

    def receive(self, layer: int, change: torch.Tensor | None, inputs: str) -> torch.Tensor:
        """Outputs (b, p, n_heads, d_head) of a layer's heads if the residual they read changes, for these inputs."""
        found = self.corrupt["head", layer]
        if change is None:
            return found
        norm, attention = self.model.attn_norm(layer), self.model.attention(layer)
        before = self.corrupt["resid_pre", layer]
        seen: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for kind in set("qkv") - set(inputs):
                module, rows = self.model.part(kind, layer), self.model.matrix(kind, layer)[1]
                freeze = partial(_freeze, module(norm(before)), slice(None) if rows is None else rows)
                hooks.callback(module.register_forward_hook(freeze).remove)
            watch = self.model.part("o", layer).register_forward_pre_hook(lambda _, read: seen.append(read[0]))
            hooks.callback(watch.remove)
            attention(hidden_states=norm(before + change), **self.given[layer])
        return seen[0].reshape(found.shape)

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


def _freeze(frozen: torch.Tensor, rows, module, inputs, output: torch.Tensor) -> torch.Tensor:
    """A hook that puts earlier values back into some features of an output."""
    output = output.clone()
    output[..., rows] = frozen[..., rows]
    return output


def _table(model, pairs: Pairs, senders, batch_size: int, work, watched=(), projected: bool = False) -> pd.DataFrame:
    """Run `work` in chunks and lay out its values (1 + senders, rows); the first is the corrupted run's, or a total."""

    @torch.no_grad()
    def chunk(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        part = _Part(model, pairs[rows], watched)
        values = work(part).double().cpu()
        clean, corrupt = (measure(run.logits, part.answers)["ld"] for run in (part.clean, part.corrupt))
        if not projected:
            _check(values[0], corrupt, part)
        return rows, values, clean, corrupt

    order = by_distance(pairs.clean)
    chunks = over_rows(chunk, len(pairs), batch_size, order)
    rows, values, clean, corrupt = (torch.cat(parts, dim=-1) for parts in zip(*chunks))
    back = torch.argsort(rows)
    values, clean, corrupt = values[:, back], clean[back], corrupt[back]
    n, partners = len(senders), [fact.subject for fact in pairs.corrupted.facts]
    columns = {name: cells * n for name, cells in (describe(pairs.clean) | {"counterfactual": partners}).items()}
    for name, cells in {
        "component": map(str, senders), "layer": (s.layer for s in senders), "head": (s.head for s in senders)
    }.items():
        columns[name] = [cell for cell in cells for _ in partners]
    table = pd.DataFrame(columns)
    table["head"] = table["head"].astype("Int64")
    if projected:
        table["effect"], table["total"] = values[1:].flatten().numpy(), values[0].repeat(n).numpy()
        table["score"] = table["effect"] / table["total"].where(table["total"] > 0)
        return table
    gap = clean - values[0]
    table["ld_clean"], table["ld_corrupt"] = clean.repeat(n).numpy(), values[0].repeat(n).numpy()
    table["ld_patched"] = values[1:].flatten().numpy()
    scores = (values[1:] - values[0]) / gap.where(gap.abs() >= SMALLEST_GAP["ld"], torch.nan)
    table["score"] = scores.flatten().numpy()
    return table


def _check(control: torch.Tensor, corrupt: torch.Tensor, part: _Part) -> None:
    """Whether the sender that changes nothing gives the corrupted run, up to the rounding of the model's dtype."""
    rounding = 50 * torch.finfo(part.model.dtype).eps * part.corrupt.logits.abs().max().item()
    off = (control - corrupt).abs().max().item()
    if not off <= rounding:
        raise TracingError(
            f"{part.model.name}: a path that changes nothing moves the logit difference by {off:.2g}; its blocks "
            "compute something that path patching does not know of"
        )
