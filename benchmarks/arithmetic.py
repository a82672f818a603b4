"""The least arithmetic that a localization method needs, in floating-point operations: the limit of any speed-up.

Counted are matrix products, two operations for each product and sum: what has to change is computed again once,
everything else is remembered. An edit changes the layers above it and the positions from it on; in the last layer
the last position and everybody's keys and values suffice.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.shapes import Shape
from helpers.models import Component


class Work:
    """Operations of a shape: for one token `q`, `kv`, `o`, `mlp`, one head's part of `o`; `forward` for all prompts."""

    def __init__(self, shape: Shape):
        self.shape, self.n = shape, shape.prompts
        self.q = self.o = 2 * shape.d_model * shape.n_heads * shape.d_head
        self.kv = 4 * shape.d_model * shape.n_kv_heads * shape.d_head
        self.mlp = 6 * shape.d_model * shape.d_mlp
        self.one_head = 2 * shape.d_model * shape.d_head
        self.pair = 4 * shape.n_heads * shape.d_head  # a query's score of a key, and its value
        self.answers = 4 * shape.d_model  # logits of two tokens
        self.forward = self.n * (self.blocks(0, 0) + 2 * shape.d_model * shape.vocab_size)
        self.runs = 2 * self.forward  # the clean and the corrupted one

    def block(self, start: int, last_only: bool = False) -> int:
        """A block for the positions from `start` on, for one prompt."""
        length = self.shape.length
        positions = length - start
        if last_only:
            return positions * self.kv + self.q + self.o + self.mlp + self.pair * length
        seen = (start + 1 + length) * positions // 2
        return positions * (self.q + self.kv + self.o + self.mlp) + self.pair * seen

    def blocks(self, layer: int, start: int) -> int:
        """All blocks from a layer on, of which the topmost needs the last position only; for one prompt."""
        missing = self.shape.n_layers - layer
        return 0 if missing == 0 else (missing - 1) * self.block(start) + self.block(start, last_only=True)


def head_paths(shape: Shape) -> int:
    """A head's part of the output matrix and the MLPs from its layer on, at the last token."""
    work = Work(shape)
    paths = sum(work.one_head + (shape.n_layers - layer) * work.mlp + work.answers for layer in range(shape.n_layers))
    return work.runs + work.n * shape.n_heads * paths


def receiver_paths(shape: Shape, senders: Sequence[Component], receivers: Sequence[Component]) -> int:
    """What a sender writes, the keys and values and the last query of the receivers above, and later MLPs."""
    work, length = Work(shape), shape.length
    read = 2 * length * work.one_head + work.one_head + 4 * length * shape.d_head + work.one_head
    total = work.runs
    for sender in senders:
        above = [receiver for receiver in receivers if receiver.layer > sender.layer]
        mlps = shape.n_layers - min(receiver.layer for receiver in above)
        total += work.n * (length * work.one_head + len(above) * read + mlps * work.mlp + work.answers)
    return total


def residual(shape: Shape) -> int:
    """One position's query, key and value; what that block adds at the positions from it on; the blocks above."""
    work, total = Work(shape), 0
    for layer in range(shape.n_layers):
        for start in range(shape.length):
            top = layer == shape.n_layers - 1
            positions = 1 if top else shape.length - start
            query = 0 if top and start < shape.length - 1 else work.q
            total += query + work.kv + positions * (work.o + work.mlp + work.pair) + work.blocks(layer + 1, start) + work.answers
    return work.runs + work.n * total


def heads(shape: Shape) -> int:
    """A head's part of the output matrix and its block's MLP at every position, then the blocks above."""
    work, total = Work(shape), 0
    for layer in range(shape.n_layers):
        positions = 1 if layer == shape.n_layers - 1 else shape.length
        total += positions * (work.one_head + work.mlp) + work.blocks(layer + 1, 0) + work.answers
    return work.runs + work.n * shape.n_heads * total


def direct_paths(shape: Shape, sender: Component) -> int:
    """What one sender writes, then for each later head its queries, its block's MLP and the blocks above."""
    work, length, total = Work(shape), shape.length, 0
    for layer in range(sender.layer + 1, shape.n_layers):
        positions = 1 if layer == shape.n_layers - 1 else length
        score = 4 * shape.d_head * (length if positions == 1 else length * (length + 1) // 2)
        head = positions * (2 * work.one_head + work.mlp) + score + work.blocks(layer + 1, 0) + work.answers
        total += shape.n_heads * head
    return work.runs + work.n * (length * work.one_head + total)


def attribution(shape: Shape) -> int:
    """Both runs, and one pass back through one of them down to what the first attention put out."""
    work = Work(shape)
    below = work.n * shape.length * (work.q + work.kv)  # of the first block, which no gradient has to pass
    return work.runs + work.forward - below
