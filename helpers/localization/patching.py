"""Activation patching: which activation, taken from one run into the other, changes the answer?

*Denoising* puts a clean activation into the corrupted run and asks what suffices to bring the answer back;
*noising* puts a corrupted activation into the clean run and asks what is needed (arXiv 2404.15255). In
both, with base and source run,

    score = (LD_patched − LD_base) / (LD_source − LD_base),   LD = logit(true) − logit(counterfactual)

so that 0 is no effect and 1 the whole of it; for denoising this is spec section 3.2's score. Patched are
the residual, attention or MLP outputs, or single heads, at positions named by role
(`helpers.localization.positions`). Exact, and cheap through `helpers.localization.engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from helpers.chunks import over_prompts
from helpers.interventions import Intervention
from helpers.localization.counterfactual import Pairs
from helpers.localization.engine import Run, flush_right
from helpers.localization.positions import choose, locate
from helpers.localization.recovery import add_scores, describe, measure
from helpers.models import Component, Model
from helpers.progress import progress
from helpers.sites import TracingError

SITES = ("resid_pre", "attn_out", "mlp_out", "head")
DIRECTIONS = {"denoise": ("corrupt", "clean"), "noise": ("clean", "corrupt")}  # base, source


def patch(
    model: Model,
    pairs: Pairs,
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    positions: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    direction: str = "denoise",
    after: int = 3,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Patch every site × layer × position role, one at a time.

    By default the picture: residual, attention and MLP outputs by role. `("head",)` patches single heads,
    usually at `("all",)` or `("last",)`. `positions` are roles or groups, None for every role from the
    subject on, `after` the number of tokens after the subject that have a role each.

    Columns: `subject`, `relation`, `counterfactual` (the partner), `site`, `layer`, `head`, `component`
    (None for the residual), `position`, `ld_…` and `p_…` for `clean`, `corrupt` and `patched`, `score`,
    `p_score`. One row a fact that has the position. Raises `TracingError` for an unknown site or layer,
    `ValueError` for an unknown position or direction.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction {direction!r}: allowed are {', '.join(DIRECTIONS)}")
    base_name, source_name = DIRECTIONS[direction]
    units = list(every(model, sites, choose(pairs.clean, positions, after), layers))

    def work(rows: torch.Tensor) -> pd.DataFrame:
        part = pairs[rows]
        batches = {"clean": flush_right(part.clean), "corrupt": flush_right(part.corrupted)}
        kept = sorted({site for site in sites if site != "resid_pre"})
        source, base = Run(model, batches[source_name], kept), Run(model, batches[base_name])
        table = sweep(base, source, units, part.answers, after, rows)
        for name, run in ((base_name, base), (source_name, source)):
            for key, values in measure(run.logits, part.answers).items():
                table[f"{key}_{name}"] = values.numpy()[table["at"]]
        return table

    tables = over_prompts(work, model, pairs.clean, batch_size, by_distance(pairs.clean))
    facts = describe(pairs.clean) | {"counterfactual": [fact.subject for fact in pairs.corrupted.facts]}
    return add_scores(tidy(tables, units, facts), base_name, source_name)


@dataclass(frozen=True)
class Unit:
    """What one edited pass changes: a site of one layer, or of a window of layers, at the tokens of a role."""

    site: str
    layer: int
    position: str
    head: int | None = None
    layers: tuple[int, ...] = ()  # the window; empty for the layer alone

    @property
    def component(self) -> str | None:
        """What `Component` calls it; None for the residual and for a window."""
        kind = {"attn_out": "attn", "mlp_out": "mlp", "head": "head"}.get(self.site)
        return None if kind is None or len(self.layers) > 1 else str(Component(kind, self.layer, self.head))

    def edits(self, source: Run, where: torch.Tensor) -> list[Intervention]:
        """Put the source run's activations in, where `where` (n, length) says."""
        chosen = None if self.head is None else [self.head]
        return [
            Intervention(self.site, layer, where, value if chosen is None else value[:, :, chosen], heads=chosen)
            for layer in self.layers or (self.layer,)
            for value in [source[self.site, layer]]
        ]


def every(
    model: Model, sites: Sequence[str], positions: Sequence[str], layers: Sequence[int] | None = None, window: int = 1
) -> Iterator[Unit]:
    """All units, by site, layer, head and position. A window lies `around` its layer; the residual has none."""
    for site in sites:
        if site not in SITES:
            raise TracingError(f"site {site!r}: allowed are {', '.join(SITES)}")
        width = 1 if site == "resid_pre" else window
        for layer in range(model.n_layers) if layers is None else layers:
            if not 0 <= layer < model.n_layers:
                raise TracingError(f"layer {layer}: {model.name} has layers 0 to {model.n_layers - 1}")
            for head in range(model.n_heads) if site == "head" else (None,):
                for position in positions:
                    yield Unit(site, layer, position, head, around(layer, width, model.n_layers))


def around(layer: int, window: int, n_layers: int) -> tuple[int, ...]:
    """The `window` w layers around a layer: from layer − ⌊w/2⌋ to layer + ⌈w/2⌉ − 1, cut at the ends."""
    return tuple(range(max(0, layer - window // 2), min(n_layers, layer - (-window // 2))))


def sweep(
    base: Run, source: Run, units: Sequence[Unit], answers: torch.Tensor, after: int, rows: torch.Tensor
) -> pd.DataFrame:
    """Effect of every unit on every prompt that has its position.

    Columns `unit`, `row` (number in `rows`, the prompts of these runs), `at` (place in `rows`), `ld_patched`,
    `p_patched`.
    """
    found = locate(base.batch, after)
    parts = [pd.DataFrame({"unit": [], "row": [], "at": []}, dtype=int)]  # should no prompt have any position
    for number, unit in enumerate(progress(units, "patching", len(units))):
        at = found[unit.position].any(1).nonzero().flatten()
        if len(at):
            logits = base.edited(unit.edits(source, found[unit.position]))
            values = measure(logits[at.to(logits.device)], answers[at])
            part = {"unit": number, "row": rows[at].numpy(), "at": at.numpy()}
            parts.append(pd.DataFrame(part | {f"{name}_patched": value.numpy() for name, value in values.items()}))
    return pd.concat(parts, ignore_index=True)


def by_distance(prompts) -> torch.Tensor:
    """Row numbers sorted by how far the subject starts from the end: what an edit recomputes for a whole chunk."""
    return torch.argsort(prompts.last - prompts.subject[:, 0], stable=True)


def tidy(tables: Sequence[pd.DataFrame], units: Sequence[Unit], facts: dict[str, list[str]]) -> pd.DataFrame:
    """One table of `sweep`'s, in the order of units and prompts, with what they are written out."""
    table = pd.concat(tables, ignore_index=True).sort_values(["unit", "row"], ignore_index=True)
    unit, row = table.pop("unit").to_numpy(), table.pop("row").to_numpy()
    columns = {name: [values[i] for i in row] for name, values in facts.items()}
    for name in ("site", "layer", "head", "component", "position"):
        columns[name] = [getattr(units[i], name) for i in unit]
    written = pd.DataFrame(columns)
    written["head"] = written["head"].astype("Int64")
    values = ["ld_clean", "ld_corrupt", "ld_patched", "p_clean", "p_corrupt", "p_patched"]
    return written.join(table[values])
