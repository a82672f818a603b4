"""Attention knock-out: between which layers does the last position read the subject?

In a window of layers the last position is kept from attending to some positions (the edge is cut before
the softmax, so the rest is renormalised). Where the true answer's probability falls, information flowed
along these edges (arXiv 2304.14767, section 5):

    score = (p_cut − p_clean) / p_clean

which is −1 where the answer is lost, 0 where nothing happens. Only the last position changes, so through
`helpers.localization.engine` a cut costs one position a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch

from helpers.chunks import over_prompts
from helpers.interventions import KnockOut
from helpers.localization.engine import Run, flush_right
from helpers.localization.patching import around
from helpers.localization.positions import choose, locate
from helpers.localization.recovery import describe, measure
from helpers.models import Model, ModelError
from helpers.progress import progress
from helpers.prompts import PromptSet


def knock_out(
    model: Model,
    prompts: PromptSet,
    keys: Sequence[str] = ("subject",),
    window: int | Sequence[int] = 1,
    layers: Sequence[int] | None = None,
    after: int = 3,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Cut attention from the last position to `keys`, in a window of layers around every layer.

    `keys` are roles or groups (`helpers.localization.positions`); `window` is a width or several; 0 cuts
    nothing. The window of width w around layer ℓ reaches from ℓ − ⌊w/2⌋ to ℓ + ⌈w/2⌉ − 1.

    Columns: `subject`, `relation`, `keys`, `window`, `layer`, `first`, `last` (the layers cut), `p_clean`,
    `p_cut`, `ld_clean`, `ld_cut` (LD = logit(true) − logit(edit answer)), `score`. One row a fact that has
    such keys. Raises `ValueError` for unknown positions or a negative window, `ModelError` for a layer that
    is not there and `TracingError` if the last position would be left with nothing to attend to.
    """
    widths = [window] if isinstance(window, int) else list(window)
    if min(widths, default=-1) < 0:
        raise ValueError(f"window {window}: widths are 0 or more")
    outside = [layer for layer in layers or () if not 0 <= layer < model.n_layers]
    if outside:
        raise ModelError(f"layers {outside}: {model.name} has layers 0 to {model.n_layers - 1}")
    names = choose(prompts, keys, after)
    centres = range(model.n_layers) if layers is None else layers
    cuts = [(name, width, layer) for name in names for width in widths for layer in centres]
    answers = prompts.option_ids[:, :2]

    def work(rows: torch.Tensor) -> pd.DataFrame:
        batch = flush_right(prompts[rows])
        run, found, tables = Run(model, batch), locate(batch, after), []
        clean = measure(run.logits, answers[rows])
        for number, (name, width, layer) in enumerate(progress(cuts, "knocking out attention", len(cuts))):
            at = found[name].any(1).nonzero().flatten()
            if not len(at):
                continue
            span = around(layer, width, model.n_layers)
            cut = measure(run.edited([KnockOut(l, "last", found[name]) for l in span]), answers[rows])
            runs = {"clean": clean, "cut": cut}
            values = {f"{of}_{name}": part[of][at].numpy() for of in ("p", "ld") for name, part in runs.items()}
            tables.append(pd.DataFrame({"number": number, "row": rows[at].numpy(), **values}))
        return pd.concat(tables) if tables else pd.DataFrame()

    table = pd.concat(over_prompts(work, model, prompts, batch_size)).sort_values(["number", "row"], ignore_index=True)
    number, row = table.pop("number"), table.pop("row")
    what = {name: [values[i] for i in row] for name, values in describe(prompts).items()}
    spans = [around(layer, width, model.n_layers) for _, width, layer in cuts]
    for place, name in enumerate(("keys", "window", "layer")):
        what[name] = [cuts[i][place] for i in number]
    what["first"], what["last"] = ([spans[i][end] if spans[i] else None for i in number] for end in (0, -1))
    table = pd.DataFrame(what).astype({"first": "Int64", "last": "Int64"}).join(table)
    table["score"] = (table["p_cut"] - table["p_clean"]) / table["p_clean"]
    return table
