"""Interventions as data: which activations are edited, and to what.

Nothing here runs a model. A pass of `helpers.tracing` hands over an activation and gets the edited
one back, so every rule about shapes and values can be read, and tested, on plain tensors. Sites and
positions are explained in `helpers.sites`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from helpers.models import Model
from helpers.sites import Batch, TracingError, feature_shape

OPS = ("replace", "add", "zero", "mean", "resample")


@dataclass(frozen=True, eq=False)
class Intervention:
    """Change an activation at one site of one layer, at the given positions.

    `op` is one of
    - `replace`: by `value`; `add`: `value` is added; `zero`: by zeros;
    - `mean`: by `value`, or without a value by the mean of the unedited activation over every real
      token of every prompt;
    - `resample`: by the unedited activation of another row. `value` is an int64 tensor (n,) that says
      which, e.g. a permutation; the k-th selected position of a row takes the k-th of the other row,
      and a pair of rows with different numbers of them is an error (use `subject_last`).

    `value` has the site's feature shape (see the table in `helpers.sites`), for one vector everywhere; or
    (n, features), one a row; or (n, length, features), one a position. `heads` (site `head`) and
    `neurons` (site `neuron`) restrict the change; `value` then covers just those, in that order.
    """

    site: str
    layer: int
    positions: str | torch.Tensor
    value: torch.Tensor | None = None
    op: str = "replace"
    heads: Sequence[int] | None = None
    neurons: Sequence[int] | None = None

    def __str__(self) -> str:
        return f"{self.op} {self.site} at layer {self.layer}"

    @property
    def units(self) -> list[int] | None:
        """The heads or neurons to change, None for all."""
        units = self.heads if self.heads is not None else self.neurons
        return None if units is None else list(units)

    @property
    def needs_clean(self) -> bool:
        """Whether its value is taken from a pass without interventions."""
        return self.op == "resample" or (self.op == "mean" and self.value is None)

    def prepare(self, model: Model, batch: Batch, clean: torch.Tensor | None) -> Edit:
        """Check against model and prompts, and reduce to an `Edit`.

        `clean` is the unedited activation (n, length, *features), used if `needs_clean`. Raises
        `TracingError`.
        """
        if self.site == "attn_pattern":
            raise TracingError(f"{self}: attn_pattern is read only; use a KnockOut to cut attention")
        if self.op not in OPS:
            raise TracingError(f"{self}: op {self.op!r}: allowed are {', '.join(OPS)}")
        features = feature_shape(model, self.site)
        shape = self._affected_shape(features)
        where = batch.at(self.positions)
        if self.op == "zero":
            value = torch.zeros(shape)
        elif self.needs_clean:
            if self.op == "resample":
                value = resample(clean, where, self.value, str(self))
            else:
                wide = torch.promote_types(clean.dtype, torch.float32)
                value = clean[batch.mask.to(clean.device)].mean(0, dtype=wide)
            if self.units is not None:
                value = value[..., self.units, :] if len(features) == 2 else value[..., self.units]
        else:
            value = self.value
        if not isinstance(value, torch.Tensor):
            raise TracingError(f"{self}: op {self.op!r} needs a value, a tensor")
        allowed = [shape, (len(batch), *shape), (*where.shape, *shape)]
        if tuple(value.shape) not in allowed:
            raise TracingError(f"{self}: value is {tuple(value.shape)}, allowed are {' or '.join(map(str, allowed))}")
        return Edit(self, where, value.detach(), len(features), self.units)

    def _affected_shape(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """The feature shape of what changes: all of the site's, or just the chosen heads or neurons."""
        for given, site in (("heads", "head"), ("neurons", "neuron")):
            if getattr(self, given) is not None and self.site != site:
                raise TracingError(f"{self}: {given} go with site {site!r} only")
        if self.units is None:
            return features
        outside = [unit for unit in self.units if not 0 <= unit < features[0]]
        if outside or not self.units:
            raise TracingError(f"{self}: heads or neurons {outside or self.units}: allowed are 0 to {features[0] - 1}")
        return (len(self.units), *features[1:])


@dataclass(frozen=True, eq=False)
class KnockOut:
    """Cut attention in one layer: queries at `queries` no longer see keys at `keys`.

    The edge is cut before the softmax, so what remains is renormalised: the model attends elsewhere
    instead of attending less. `heads` restricts the cut to some heads.
    """

    layer: int
    queries: str | torch.Tensor
    keys: str | torch.Tensor
    heads: Sequence[int] | None = None
    site = "attn_pattern"
    needs_clean = False

    def __str__(self) -> str:
        return f"knock-out at layer {self.layer}"

    def prepare(self, model: Model, batch: Batch, clean: None) -> KnockOut:
        """The same cut with positions as boolean tensors (n, length) and all heads listed."""
        heads = list(range(model.n_heads) if self.heads is None else self.heads)
        if not heads or not all(0 <= head < model.n_heads for head in heads):
            raise TracingError(f"{self}: heads {heads}: allowed are 0 to {model.n_heads - 1}")
        return KnockOut(self.layer, batch.at(self.queries), batch.at(self.keys), heads)

    def edges(self, rows: torch.Tensor, n_heads: int) -> torch.Tensor:
        """What a prepared cut covers in these rows: booleans (b, n_heads, query, key)."""
        heads = torch.zeros(n_heads, 1, 1, dtype=torch.bool)
        heads[self.heads] = True
        return heads & self.queries[rows][:, None, :, None] & self.keys[rows][:, None, None, :]

    def close(self, mask: torch.Tensor | None, edges: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """An additive attention mask (b, 1 or n_heads, query, key) with the edges closed.

        Such a mask holds 0 where attention is allowed and the lowest number where it is not. Returns
        the closed mask (b, n_heads, query, key) and how many of the edges were open before. Raises
        `TracingError` if a query would be left with no key at all: its softmax would then spread over
        every position, padding and future included.
        """
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or not mask.is_floating_point():
            found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise TracingError(f"{self}: attention mask is {found}, expected eager attention's (b, 1, query, key)")
        edges, lowest = edges.to(mask.device), torch.finfo(mask.dtype).min
        is_open = (mask > lowest / 2).expand_as(edges)
        blind = is_open.any(-1) & ~(is_open & ~edges).any(-1)
        if blind.any():
            row, _, query = blind.nonzero()[0].tolist()
            raise TracingError(
                f"{self}: position {query} of row {int(rows[row])} would have no key left to attend to; "
                "leave it out of the queries"
            )
        return mask.expand_as(edges).masked_fill(edges, lowest), int((is_open & edges).sum())


@dataclass(frozen=True, eq=False)
class Edit:
    """An `Intervention` checked against model and prompts, reduced to `replace` or `add`.

    `where` is (n, length); `value` broadcasts as described at `Intervention`, with `features` counting
    its feature dimensions; `units` index the first feature dimension.
    """

    source: Intervention
    where: torch.Tensor
    value: torch.Tensor
    features: int
    units: list[int] | None

    def touches(self, activation: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Which elements of an activation (b, p, *features) of these rows may change, as booleans."""
        where = self.where[rows].to(activation.device)
        where = where.view(*where.shape, *[1] * self.features)
        if self.units is None:
            return where.expand_as(activation)
        touched = torch.zeros_like(activation, dtype=torch.bool)
        touched[:, :, self.units] = where.expand_as(activation[:, :, self.units])
        return touched

    def apply(self, activation: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The edited copy of an activation (b, p, *features) of these rows."""
        value = self.value
        if value.ndim > self.features:
            value = value[rows.to(value.device)]
            if value.ndim == self.features + 1:
                value = value.unsqueeze(1)
        value = value.to(activation.device, activation.dtype)
        edited = activation.clone()
        part = edited if self.units is None else edited[:, :, self.units]
        value = (part + value if self.source.op == "add" else value).expand_as(part)
        edited[:, :, slice(None) if self.units is None else self.units] = value
        return torch.where(self.touches(activation, rows), edited, activation)

    def verify(self, before: torch.Tensor, after: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The largest absolute change, a scalar tensor.

        Raises `TracingError` unless `after` is `before` with this edit, changed as asked and equal bit
        for bit everywhere else.
        """

        def same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return (one == other) | (one.isnan() & other.isnan())

        moved = ~same(after, before)
        if not same(after, self.apply(before, rows)).all() or (moved & ~self.touches(before, rows)).any():
            raise TracingError(f"{self.source}: did not take effect as asked on an activation {tuple(before.shape)}")
        return (after - before).detach().abs().where(moved, 0).max()


def resample(clean: torch.Tensor, where: torch.Tensor, order: torch.Tensor, label: str) -> torch.Tensor:
    """Value (n, length, *features) that gives row r the activation of row `order[r]`.

    `clean` (n, length, *features) and `where` (n, length); the k-th selected position of a row takes
    the k-th selected position of the other. Raises `TracingError` if their numbers differ.
    """
    n = len(where)
    if not isinstance(order, torch.Tensor) or order.is_floating_point() or order.shape != (n,):
        raise TracingError(f"{label}: value must be one row number for each of the {n} rows, an int64 tensor ({n},)")
    order = order.long().cpu()
    if order.min() < 0 or order.max() >= n:
        raise TracingError(f"{label}: a row number in value lies outside 0 to {n - 1}")
    counts = where.sum(1)
    unequal = (counts != counts[order]).nonzero().flatten()
    if len(unequal):
        row = int(unequal[0])
        raise TracingError(
            f"{label}: row {row} has {int(counts[row])} positions and row {int(order[row])}, from which it should "
            f"take, has {int(counts[order[row]])}; use a single position such as subject_last"
        )
    target_row, target = where.nonzero().unbind(1)
    source_row, source = where[order].nonzero().unbind(1)
    value = torch.zeros_like(clean)
    value[target_row, target] = clean[order[source_row], source]
    return value
