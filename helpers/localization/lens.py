"""What the residual says about the answer: logit lens, and direct logit attribution.

The **logit lens** reads the residual after every block through the model's own final norm, unembedding
and cap, as if it were the last (nostalgebraist, 2020).

**Direct logit attribution** splits LD = logit(true) − logit(alternative) at the last position into what each part
of the model wrote there. All that stands between a part and the logits is held at its value in this run, which
makes it linear: the scale of the final norm, under Gemma2 the scale of the norm after attention and MLP,
and the slope of the cap between the two logits. The contributions sum to LD.

    contribution(x) = f · ⟨N(x), w_true − w_alternative⟩

with w the rows of the unembedding, N(x) = g ⊙ s·x the frozen norm (x centred first under LayerNorm), and
f = LD / (LD before the cap), a number in (0, 1], 1 without a cap. A frozen norm is arXiv 2211.00593's convention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
import torch
from torch import nn

from helpers import tracing
from helpers.chunks import over_prompts
from helpers.localization.engine import Run, flush_right
from helpers.localization.positions import choose, locate
from helpers.localization.recovery import describe, measure
from helpers.models import Component, Model
from helpers.progress import progress
from helpers.prompts import PromptSet
from helpers.sites import TracingError

ANSWERS = ("true", "edit")


def logit_lens(
    model: Model,
    prompts: PromptSet,
    positions: Sequence[str] = ("last", "subject last"),
    after: int = 3,
    batch_size: int = 64,
) -> pd.DataFrame:
    """True and edit answer as each layer's residual would predict them, at single-token positions.

    Columns: `subject`, `relation`, `position`, `layer` (0 = embeddings, ℓ + 1 = after block ℓ, as for probes),
    `logit_…`, `p_…` and `rank_…` (0 = the model's first choice) for `true` and `edit`, and `ld`, the difference
    of the logits. The last layer's rows at `last` are the model's prediction. One row a fact that has the
    position. Raises `ValueError` for a position that is several tokens in some prompt, or not known.
    """
    names = choose(prompts, positions, after)
    several = [name for name, where in locate(prompts, after).items() if name in names and where.sum(1).max() > 1]
    if several:
        raise ValueError(f"positions {several} are several tokens in some prompts: the lens reads one at a time")
    ids = prompts.option_ids[:, :2]

    def work(rows: torch.Tensor) -> pd.DataFrame:
        batch = flush_right(prompts[rows])
        run, found, tables = Run(model, batch), locate(batch, after), []
        for layer in progress(range(model.n_layers + 1), "logit lens", model.n_layers + 1):
            residual = run["resid_pre", layer] if layer < model.n_layers else run["resid_post", layer - 1]
            for number, name in enumerate(names):
                at = found[name].any(1).nonzero().flatten()
                if len(at):
                    values = _read(run, residual[at, found[name][at].int().argmax(1)], ids[rows[at]])
                    tables.append(pd.DataFrame({"number": number, "layer": layer, "row": rows[at].numpy(), **values}))
        return pd.concat(tables)

    table = pd.concat(over_prompts(work, model, prompts, batch_size))
    table = table.sort_values(["number", "layer", "row"], ignore_index=True)
    table.insert(0, "position", [names[i] for i in table.pop("number")])
    return _named(table, prompts)


def direct_attribution(
    model: Model, prompts: PromptSet, alternatives: torch.Tensor | None = None, batch_size: int = 64
) -> pd.DataFrame:
    """Contributions to LD at the last position: embedding, attentions, their heads, MLPs, biases.

    LD compares the true answer with `alternatives` (n,), token ids, by default the edit answers.

    Columns: `subject`, `relation`, `component`, `kind`, `layer`, `head`, `score` (in logits), `ld`. For each fact the
    scores of the kinds `embed`, `attn`, `mlp` and `bias` sum to `ld` (up to rounding of the model's dtype); an
    attention's score is the sum of its heads' (kind `head`) and of its output bias (kind `attn bias`), where it
    has one. Raises `TracingError` for a norm that is neither RMS norm nor LayerNorm.
    """
    ids = prompts.option_ids[:, :2].clone()
    if alternatives is not None:
        ids[:, 1] = alternatives.to(ids.device)

    def work(rows: torch.Tensor) -> pd.DataFrame:
        parts, ld = _contributions(model, prompts[rows], ids[rows])
        what = ("component", "kind", "layer", "head")
        values = {"row": rows.numpy(), "ld": ld.cpu().numpy()}
        tables = [pd.DataFrame(dict(zip(what, part)) | {"score": part[-1].cpu().numpy()} | values) for part in parts]
        return pd.concat([table.astype({"layer": "Int64", "head": "Int64"}) for table in tables])

    table = pd.concat(over_prompts(work, model, prompts, batch_size), ignore_index=True)
    order = {name: number for number, name in enumerate(dict.fromkeys(table["component"]))}
    by = ["component", "row"]
    table = table.sort_values(by, key=lambda c: c.map(order) if c.name == "component" else c, ignore_index=True)
    return _named(table, prompts)


class FrozenNorm:
    """A norm as the linear map that it was for given inputs: y = g ⊙ s·x + b, with x centred first under LayerNorm.

    Args:
        norm: the module. `x`, `y`: its input and output, (n, d).

    Raises `TracingError` if y is not of this form.
    """

    def __init__(self, norm: nn.Module, x: torch.Tensor, y: torch.Tensor):
        self.centres = isinstance(norm, nn.LayerNorm)
        wide = torch.promote_types(x.dtype, torch.float32)
        x, y = x.to(wide), y.to(wide)
        self.bias = norm.bias.to(wide) if self.centres and norm.bias is not None else x.new_zeros(x.shape[-1])
        if self.centres:
            self.gain = x.new_ones(x.shape[-1]) if norm.weight is None else norm.weight.to(wide)
        else:
            # of a large constant vector an RMS norm leaves its gain alone, be it w or 1 + w
            self.gain = norm(x.new_full((1, x.shape[-1]), 1e4))[0].to(x)
        scaled = self.gain * self._centre(x)
        self.scale = ((y - self.bias) * scaled).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True)
        error = (self.scale * scaled + self.bias - y).norm(dim=-1) / y.norm(dim=-1)
        if not (error < 0.02).all():  # two bfloat16 roundings are below .01
            raise TracingError(f"{type(norm).__name__} is neither an RMS norm nor a LayerNorm: off by {error.max():.2g}")

    def pull(self, direction: torch.Tensor) -> torch.Tensor:
        """u such that ⟨u, x⟩ = ⟨direction, N(x)⟩ without the bias: the transposed map, (n, d)."""
        return self._centre(self.scale * self.gain * direction)

    def _centre(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True) if self.centres else x


@torch.no_grad()
def _contributions(model: Model, prompts: PromptSet, ids: torch.Tensor) -> tuple[list[tuple], torch.Tensor]:
    """[(component, kind, layer, head, score (n,))], and LD (n,)."""
    layers = range(model.n_layers)
    sites = [("embed", 0), ("resid_post", model.n_layers - 1)]
    sites += [(site, layer) for layer in layers for site in ("head", "attn_out", "mlp_out")]
    trace = tracing.read(model, prompts, sites, positions="last", batch_size=len(prompts))
    final = trace["resid_post", model.n_layers - 1]
    normed = model.final_norm(final)
    norm = FrozenNorm(model.final_norm, final, normed)
    wide = norm.scale.dtype
    ids = ids.to(model.unembed.weight.device)
    weights = model.unembed.weight[ids].to(wide)
    towards = weights[:, 0] - weights[:, 1]
    offset = 0 if model.unembed.bias is None else model.unembed.bias[ids].to(wide)
    offset = offset if isinstance(offset, int) else offset[:, 0] - offset[:, 1]
    ld = measure(trace.logits, ids)["ld"].to(towards.device)
    uncapped = (normed.to(wide) * towards).sum(-1) + offset
    if model.final_softcap is not None:
        towards = towards * (ld / uncapped).to(wide)[:, None]
        offset = offset * (ld / uncapped).to(wide)
    pulled = norm.pull(towards)

    def along(direction: torch.Tensor, site: str, layer: int) -> torch.Tensor:
        return (trace[site, layer].to(direction) * direction).sum(-1)

    found = [("embed", "embed", None, None, along(pulled, "embed", 0))]
    for layer in layers:
        found += _heads(model, layer, trace, pulled)
        found.append((str(Component("attn", layer)), "attn", layer, None, along(pulled, "attn_out", layer)))
        found.append((str(Component("mlp", layer)), "mlp", layer, None, along(pulled, "mlp_out", layer)))
    found.append(("bias", "bias", None, None, (towards * norm.bias).sum(-1) + offset))
    return found, ld


def _heads(model: Model, layer: int, trace: tracing.Trace, pulled: torch.Tensor) -> Iterator[tuple]:
    """Contributions of a layer's heads and of its output bias; `pulled` (n, d_model) is read off the residual."""
    z = trace["head", layer].to(pulled)
    matrix, post_norm = model.matrix("o", layer)[0].to(pulled), model.attn_post_norm(layer)
    bias = model.bias("o", layer)
    if post_norm is not None:
        written = z.flatten(1) @ matrix.T + (0 if bias is None else bias[0].to(pulled))
        pulled = FrozenNorm(post_norm, written, trace["attn_out", layer].to(pulled)).pull(pulled)
    scores = ((pulled @ matrix).view(z.shape) * z).sum(-1)
    for head in range(model.n_heads):
        yield str(Component("head", layer, head)), "head", layer, head, scores[:, head]
    if bias is not None:
        yield f"attn bias {layer}", "attn bias", layer, None, pulled @ bias[0].to(pulled)


@torch.no_grad()
def _read(run: Run, residual: torch.Tensor, ids: torch.Tensor) -> dict:
    """Logit, probability and rank of the two answers from residuals (n, d_model), and the logits' difference."""
    logits = run.unembed(residual).float()
    ids = ids.to(logits.device)
    chosen = logits.gather(1, ids)
    p = (chosen - logits.logsumexp(-1, keepdim=True)).exp()
    values = {}
    for i, name in enumerate(ANSWERS):
        values[f"logit_{name}"], values[f"p_{name}"] = chosen[:, i].cpu().numpy(), p[:, i].cpu().numpy()
        values[f"rank_{name}"] = (logits > chosen[:, i, None]).sum(-1).cpu().numpy()
    return values | {"ld": (chosen[:, 0] - chosen[:, 1]).cpu().numpy()}


def _named(table: pd.DataFrame, prompts: PromptSet) -> pd.DataFrame:
    row = table.pop("row")
    return pd.DataFrame({name: [values[i] for i in row] for name, values in describe(prompts).items()}).join(table)
