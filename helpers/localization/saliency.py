"""Importance of weights for the facts: the rivals of a mechanistic choice that need no interpretation.

With ℓ_i the cross-entropy of fact i's true answer at the prompt's last token (the loss that unlearning raises),
g_i its gradient with respect to a weight matrix W, and sums over the weights of a component,

    grad_weight_i = Σ |g_i · W|      gradient × weight, taken absolutely so that it cannot cancel (arXiv 1810.02340;
                                     for unlearning arXiv 2310.12508, which takes |g| alone)
    fisher_i      = Σ g_i²           whose mean over facts is the diagonal Fisher information (arXiv 1612.00796,
                                     2308.07707)
    scaling_i     = Σ g_i · W        the change of ℓ_i for each unit by which the whole component is scaled up

One pass a fact: a gradient of the mean loss is not the mean of squared gradients. Each matrix is reduced to a few
numbers as soon as its gradient is there, so no more than one gradient is held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from helpers.localization.recovery import describe
from helpers.masks import Mask, Matrix, matrices, owned_blocks, parse, size
from helpers.models import Component, Model
from helpers.progress import progress
from helpers.prompts import PromptSet

MEASURES = ("grad_weight", "fisher", "scaling")
KINDS = ("attn", "mlp", "head")


@dataclass(frozen=True, eq=False)
class Saliency:
    """Importance by component and fact, and by weight if asked for.

    `table` has the columns `subject`, `relation`, `component`, `kind`, `layer`, `head`, `n_parameters`, `loss`,
    `grad_weight`, `fisher`, `scaling` and `score`, which is `grad_weight`; average over facts. Sums favour large
    components: divide by `n_parameters` for importance per weight.

    `weights` maps `grad_weight` (mean of |g_i · W|) and `fisher` (mean of g_i²) to parameter name → tensor of the
    parameter's shape, float32 on the CPU, for the parameters that were asked for.
    """

    table: pd.DataFrame
    weights: dict[str, dict[str, torch.Tensor]] = field(repr=False)


def saliency(
    model: Model,
    prompts: PromptSet,
    units: Sequence[str] = KINDS,
    weights: Mask | None = None,
) -> Saliency:
    """Gradient × weight and Fisher importance for these prompts.

    `units` are kinds (`attn`, `mlp`, `head`, or a matrix such as `gate`) or single units (`mlp 3`, `gate 3`, see
    `helpers.masks`). A head's importance is over what `masks` says it owns. `weights`: keep per-weight importance
    for the parameters of this mask; `selection.everything(model)` keeps all, in twice the model's size at float32.

    The model's parameters are frozen again, without gradients, when this returns.
    """
    chosen = _expand(model, units)
    if weights is not None:
        weights.check(model)
    watched = matrices(model)
    sums = {(m.kind, m.layer): [] for m in watched}  # a tensor (measures, blocks) for each fact
    kept = {measure: {} for measure in ("grad_weight", "fisher")}
    by_parameter: dict[str, list[Matrix]] = {}
    for matrix in watched:
        by_parameter.setdefault(f"{model.path(matrix.kind, matrix.layer)}.weight", []).append(matrix)

    def reduce(name: str, parameter: torch.nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad.float(), None
        product = gradient * parameter.detach().float()
        for matrix in by_parameter[name]:
            per_block = [_by_block(model, matrix, values) for values in (product.abs(), gradient.square(), product)]
            sums[matrix.kind, matrix.layer].append(torch.stack(per_block).double().cpu())
        if weights is not None and weights.covers(name):
            for measure, values in {"grad_weight": product.abs(), "fisher": gradient.square()}.items():
                total = kept[measure].setdefault(name, torch.zeros(parameter.shape))
                total += values.cpu() / len(prompts)

    losses = []
    with ExitStack() as stack:
        for name in by_parameter:
            parameter = model.hf.get_parameter(name)
            stack.callback(_freeze, parameter, parameter.requires_grad)
            parameter.requires_grad_()
            stack.callback(parameter.register_post_accumulate_grad_hook(partial(reduce, name)).remove)
        stack.enter_context(torch.enable_grad())
        for row in progress(range(len(prompts)), "saliency", len(prompts)):
            tokens = prompts.tokens[row][prompts.mask[row].bool()][None].to(model.device)
            logits = model.hf(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[0, -1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(logits, prompts.answer_ids[row].to(logits.device))
            loss.backward()
            losses.append(loss.item())
    table = _table(model, prompts, chosen, {key: torch.stack(parts) for key, parts in sums.items()}, losses)
    return Saliency(table, kept)


def _freeze(parameter: torch.nn.Parameter, tracked: bool) -> None:
    parameter.requires_grad_(tracked)
    parameter.grad = None


def _by_block(model: Model, matrix: Matrix, values: torch.Tensor) -> torch.Tensor:
    """Sums of a matrix's values over the blocks that `masks.owned_blocks` counts: heads, groups, or all of it."""
    if matrix.kind == "o":
        return values.unflatten(1, (model.n_heads, model.d_head)).sum((0, 2))
    if matrix.kind not in ("q", "k", "v"):
        return values.sum()[None]
    rows = model.matrix(matrix.kind, matrix.layer)[1]
    values = values if rows is None else values[rows.to(values.device)]
    return values.unflatten(0, (-1, model.d_head)).sum((1, 2))


def _expand(model: Model, units: Sequence[str]) -> list[Component | Matrix]:
    """Kinds written out, single units taken as they are."""
    chosen = []
    for unit in units:
        if unit in KINDS:
            chosen += model.components(unit)
        elif " " in unit:
            chosen.append(parse(unit))
        else:
            chosen += [parse(f"{unit} {layer}") for layer in range(model.n_layers)]
    return chosen


def _table(model: Model, prompts: PromptSet, units, sums: dict, losses: Sequence[float]) -> pd.DataFrame:
    facts = describe(prompts)
    tables = []
    for unit in units:
        owned = owned_blocks(model, [unit])
        values = sum(sums[key][:, :, sorted(blocks)].sum(-1) for key, blocks in owned.items())  # (facts, measures)
        named = {"component": str(unit), "kind": unit.kind, "layer": unit.layer, "head": getattr(unit, "head", None)}
        row = facts | named | {"n_parameters": size(model, unit), "loss": np.array(losses)}
        tables.append(pd.DataFrame(row | dict(zip(MEASURES, values.T.numpy()))))
    table = pd.concat([table.astype({"head": "Int64"}) for table in tables], ignore_index=True)
    return table.assign(score=table["grad_weight"])
