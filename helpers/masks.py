"""Which weights an edit may touch: units of a model, and the mask that they make.

    flu = mask(model, ["mlp 2", "mlp 3"])
    flu.n_parameters, flu.layers, flu.entries     # parameter name -> None (all of it) or booleans

A unit is a `Component` (`mlp 3`, `attn 5`, `head 5.2`) or a single matrix (`gate 3`, `up 3`, `down 3`, also
`q`, `k`, `v`, `o`). As in the paper (spec section 2), the weights that may be trained are the seven matrices
q, k, v, o, gate, up and down; only they are counted, and embeddings, norms and biases stay frozen.

A head owns its rows of q and its columns of o. A slice of k and v belongs to a group of heads (of one head,
under plain multi-head attention) and is owned, and counted, once every head of the group is chosen: masks
of different heads never overlap, and all heads of a layer make exactly its attention block.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from helpers.models import Component, Model

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")
MATRICES = ATTENTION + MLP


class SelectionError(ValueError):
    """A selection that cannot be made, or a mask that belongs to another model."""


@dataclass(frozen=True)
class Matrix:
    """One of the seven weight matrices of a layer, written `gate 3`."""

    kind: str
    layer: int

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}"


Unit = Component | Matrix


@dataclass(frozen=True, eq=False)
class Mask:
    """The weights an edit may touch.

    `entries` maps a parameter's name to None (all of it) or a boolean tensor of its shape, on the CPU; `units`
    are what they were made from, none for single weights.
    `counts` holds the number of selected weights by matrix kind, `shapes` the shape of every matrix of the
    model it was made for, `budget` the number of weights that was asked for, if one was.
    """

    name: str
    units: tuple[str, ...]
    entries: dict[str, torch.Tensor | None] = field(repr=False)
    layers: tuple[int, ...]
    counts: dict[str, int] = field(repr=False)
    shapes: dict[str, tuple[int, int]] = field(repr=False)
    budget: int | None = None

    @property
    def n_parameters(self) -> int:
        return sum(self.counts.values())

    @property
    def share(self) -> float:
        """Selected share of all counted weights of the model."""
        return self.n_parameters / sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def overshoot(self) -> float | None:
        """How far the budget was exceeded, as a share of it (whole units are added, as in the paper)."""
        return None if self.budget is None else self.n_parameters / self.budget - 1

    @property
    def digest(self) -> str:
        """Content hash of the selected weights and the shapes of the model; name, units and budget do not count."""
        content = hashlib.sha256(repr(sorted(self.shapes.items())).encode())
        for name, part in sorted(self.entries.items()):
            bits = "all" if part is None else hashlib.sha256(part.numpy().tobytes()).hexdigest()
            content.update(f"{name}={bits};".encode())
        return content.hexdigest()[:16]

    def covers(self, name: str) -> bool:
        """Whether any weight of the parameter with this name is selected."""
        return name in self.entries

    def check(self, model: Model) -> None:
        """Raise `SelectionError` unless the model's matrices are, by name and shape, those this mask was made for."""
        found = _shapes(model)
        for name in dict.fromkeys([*self.shapes, *found]):
            here, there = self.shapes.get(name, "absent"), found.get(name, "absent")
            if here != there:
                raise SelectionError(
                    f"mask {self.name!r} was made for another model than {model.name}: "
                    f"{name} is {here} there and {there} here"
                )

    def overlap(self, other: Mask) -> float:
        """Weights that two masks of one model share, as a share of all that either selects (Jaccard)."""
        if self.shapes != other.shapes:
            raise SelectionError(f"masks {self.name!r} and {other.name!r} belong to different models")
        shared = 0
        for name in self.entries.keys() & other.entries.keys():
            everywhere = torch.ones((), dtype=torch.bool)
            one, two = (everywhere if part is None else part for part in (self.entries[name], other.entries[name]))
            shared += int((one & two).expand(self.shapes[name]).sum())
        return shared / (self.n_parameters + other.n_parameters - shared)


def parse(text: str) -> Unit:
    """The unit that `str` writes as `text`. Raises `SelectionError`."""
    kind, _, layer = text.partition(" ")
    if kind in MATRICES and layer.isdigit():
        return Matrix(kind, int(layer))
    try:
        return Component.parse(text)
    except ValueError:
        raise SelectionError(f"{text!r} is no unit: write 'mlp 3', 'attn 5', 'head 5.2' or 'gate 3'") from None


def matrices(model: Model) -> list[Matrix]:
    """Every matrix of the model, by layer (GPT-NeoX has no gate)."""
    kinds = [kind for kind in MATRICES if kind != "gate" or "gate" in model.roles]
    return [Matrix(kind, layer) for layer in range(model.n_layers) for kind in kinds]


def mask(model: Model, units: Iterable[str | Unit], name: str = "", budget: int | None = None) -> Mask:
    """The weights that these units own together. Raises `SelectionError` for none, or one that is not there."""
    units = _parse_all(units)
    if not units:
        raise SelectionError(f"mask {name!r}: an empty selection, there is nothing to edit")
    owned = owned_blocks(model, units)
    entries: dict[str, torch.Tensor | None] = {}
    counts = dict.fromkeys(MATRICES, 0)
    for kind, layer in sorted(owned, key=lambda key: (key[1], MATRICES.index(key[0]))):
        blocks = owned[kind, layer]
        counts[kind] += len(blocks) * _block_size(model, kind, layer)
        parameter, rows = model.matrix(kind, layer)
        path = f"{model.path(kind, layer)}.weight"
        if rows is None and len(blocks) == _n_blocks(model, kind):
            entries[path] = None
            continue
        part = entries.setdefault(path, torch.zeros(parameter.shape, dtype=torch.bool))
        for block in sorted(blocks):
            own = slice(block * model.d_head, (block + 1) * model.d_head)
            part[(slice(None), own) if kind == "o" else own if rows is None else rows[own]] = True
    # a fused matrix is whole once q, k and v have all been written into it
    entries = {path: None if part is None or part.all() else part for path, part in entries.items()}
    layers = tuple(sorted({layer for _, layer in owned}))
    names = tuple(map(str, units))
    return Mask(name or ", ".join(names), names, entries, layers, counts, _shapes(model), budget)


def from_weights(model: Model, entries: Mapping[str, torch.Tensor], name: str) -> Mask:
    """A mask of single weights: parameter name → booleans of its shape. Raises `SelectionError` if one does not fit."""
    shapes, counts, layers = _shapes(model), dict.fromkeys(MATRICES, 0), set()
    for path, part in entries.items():
        if part.dtype != torch.bool or tuple(part.shape) != shapes.get(path):
            expected = f"booleans {shapes[path]}" if path in shapes else "one of the model's matrices"
            raise SelectionError(f"mask {name!r}: {path} is {part.dtype} {tuple(part.shape)}, expected {expected}")
    chosen = {path: part.cpu() for path, part in entries.items() if part.any()}
    for unit in matrices(model):
        path = f"{model.path(unit.kind, unit.layer)}.weight"
        if path in chosen:
            rows = model.matrix(unit.kind, unit.layer)[1]
            counts[unit.kind] += int(chosen[path][slice(None) if rows is None else rows].sum())
            layers.add(unit.layer)
    if not chosen:
        raise SelectionError(f"mask {name!r}: an empty selection, there is nothing to edit")
    entries = {path: None if part.all() else part for path, part in chosen.items()}
    return Mask(name, (), entries, tuple(sorted(layers)), counts, shapes)


def size(model: Model, units: str | Unit | Iterable[str | Unit]) -> int:
    """Number of weights that a unit, or several units together, own."""
    units = [units] if isinstance(units, str | Component | Matrix) else units
    owned = owned_blocks(model, units)
    return sum(len(blocks) * _block_size(model, kind, layer) for (kind, layer), blocks in owned.items())


def _parse_all(units: Iterable[str | Unit]) -> list[Unit]:
    return list(dict.fromkeys(parse(unit) if isinstance(unit, str) else unit for unit in units))


def owned_blocks(model: Model, units: Iterable[str | Unit]) -> dict[tuple[str, int], set[int]]:
    """(matrix kind, layer) → the blocks that these units own: heads of q and o, groups of k and v, 0 of an MLP."""
    owned, heads = defaultdict(set), defaultdict(set)
    for unit in _parse_all(units):
        if unit.layer >= model.n_layers or (getattr(unit, "head", None) or 0) >= model.n_heads:
            raise SelectionError(f"{unit}: {model.name} has {model.n_layers} layers of {model.n_heads} heads")
        if unit.kind == "head":
            heads[unit.layer].add(unit.head)
            continue
        kinds = {"attn": ATTENTION, "mlp": MLP}.get(unit.kind, (unit.kind,))
        present = [kind for kind in kinds if kind != "gate" or "gate" in model.roles]
        if not present:
            raise SelectionError(f"{unit}: the MLPs of {model.name} have no gate")
        for kind in present:
            owned[kind, unit.layer] |= set(range(_n_blocks(model, kind)))
    width = model.n_heads // model.n_kv_heads
    for layer, chosen in heads.items():
        full = {g for g in range(model.n_kv_heads) if chosen >= set(range(g * width, (g + 1) * width))}
        for kind, blocks in {"q": chosen, "o": chosen, "k": full, "v": full}.items():
            if blocks:
                owned[kind, layer] |= blocks
    return dict(owned)


def _n_blocks(model: Model, kind: str) -> int:
    return {"q": model.n_heads, "o": model.n_heads, "k": model.n_kv_heads, "v": model.n_kv_heads}.get(kind, 1)


def _block_size(model: Model, kind: str, layer: int) -> int:
    parameter, rows = model.matrix(kind, layer)
    weights = parameter.numel() if rows is None else len(rows) * parameter.shape[1]
    return weights // _n_blocks(model, kind)


def _shapes(model: Model) -> dict[str, tuple[int, int]]:
    return {
        f"{model.path(unit.kind, unit.layer)}.weight": tuple(model.matrix(unit.kind, unit.layer)[0].shape)
        for unit in matrices(model)
    }
