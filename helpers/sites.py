"""Where an activation is: sites of a model, positions of a prompt.

Sites, with the shape of an activation there (b rows, p positions):

| site | what | shape |
|---|---|---|
| `embed` | what the first block receives: embeddings, scaled where the family scales them; layer 0 | b, p, d_model |
| `resid_pre`, `resid_post` | the residual before and after a block | b, p, d_model |
| `attn_out`, `mlp_out` | what attention and MLP add to the residual, so after Gemma2's post-norms | b, p, d_model |
| `head` | every head's output before the output matrix | b, p, n_heads, d_head |
| `neuron` | the MLP's input to its down-projection | b, p, d_mlp |
| `attn_pattern` | attention probabilities, read only | b, n_heads, query, key |

Positions are `"last"` (last real token), `"subject"` (every token of the subject), `"subject_first"`,
`"subject_last"`, `"all"` (every real token, padding excluded) or a boolean tensor (n, length).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch

from helpers.models import Model

SITES = ("embed", "resid_pre", "resid_post", "attn_out", "mlp_out", "head", "neuron", "attn_pattern")
POSITIONS = ("last", "subject", "subject_first", "subject_last", "all")


class TracingError(ValueError):
    """A read or an intervention that does not fit the model or the prompts, or did not take effect."""


class Step(IntEnum):
    """The places inside a block, in the order in which a forward pass comes to them."""

    BLOCK_IN = 0
    ATTENTION_IN = 1
    HEADS = 2
    ATTENTION_OUT = 3
    ATTENTION_NORMED = 4
    NEURONS = 5
    MLP_OUT = 6
    BLOCK_OUT = 7


def place(model: Model, site: str, layer: int) -> tuple[Step, str]:
    """When a site comes up in its block, and the role of the module that holds it.

    Raises `TracingError` for a site or a layer that the model does not have.
    """
    if site not in SITES:
        raise TracingError(f"site {site!r}: allowed are {', '.join(SITES)}")
    if not 0 <= layer < model.n_layers or (site == "embed" and layer != 0):
        layers = "0" if site == "embed" else f"0 to {model.n_layers - 1}"
        raise TracingError(f"{site} at layer {layer}: allowed layers are {layers}")
    if site == "attn_out" and "attn_post_norm" in model.roles:
        return Step.ATTENTION_NORMED, "attn_post_norm"
    if site == "mlp_out" and "mlp_post_norm" in model.roles:
        return Step.MLP_OUT, "mlp_post_norm"
    return {
        "embed": (Step.BLOCK_IN, "block"),
        "resid_pre": (Step.BLOCK_IN, "block"),
        "head": (Step.HEADS, "o"),
        "attn_pattern": (Step.ATTENTION_OUT, "attention"),
        "attn_out": (Step.ATTENTION_OUT, "attention"),
        "neuron": (Step.NEURONS, "down"),
        "mlp_out": (Step.MLP_OUT, "mlp"),
        "resid_post": (Step.BLOCK_OUT, "block"),
    }[site]


def feature_shape(model: Model, site: str) -> tuple[int, ...]:
    """Shape of the activation at one position, for every site but `attn_pattern`."""
    return {"head": (model.n_heads, model.d_head), "neuron": (model.d_mlp,)}.get(site, (model.d_model,))


@dataclass(frozen=True, eq=False)
class Batch:
    """What tracing needs of a prompt set, as tensors: n rows of `length` tokens.

    `tokens`, `mask` (True on real tokens) and `position_ids` are (n, length), `last` (n,) is the
    index of the last real token, `subject` (n, 2) the first and the past-the-end index of the
    subject, or None. Padding may be on either side.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor
    last: torch.Tensor
    subject: torch.Tensor | None = None

    @classmethod
    def of(cls, prompts) -> Batch:
        """Take the fields of a `PromptSet`. Raises `TracingError` if they do not fit together."""
        subject = getattr(prompts, "subject", None)
        batch = cls(
            tokens=prompts.tokens.long().cpu(),
            mask=prompts.mask.bool().cpu(),
            position_ids=prompts.position_ids.long().cpu(),
            last=prompts.last.long().cpu(),
            subject=None if subject is None else subject.long().cpu(),
        )
        n = len(batch)
        for name, shape in {"mask": batch.tokens.shape, "position_ids": batch.tokens.shape, "last": (n,)}.items():
            found = tuple(getattr(batch, name).shape)
            if batch.tokens.ndim != 2 or n == 0 or found != tuple(shape):
                raise TracingError(f"prompts: tokens {tuple(batch.tokens.shape)} and {name} {found} do not fit")
        if not batch.mask[torch.arange(n), batch.last].all():
            raise TracingError("prompts: the last token of some row is padding")
        return batch

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: torch.Tensor) -> Batch:
        return Batch(*(None if value is None else value[rows] for value in vars(self).values()))

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if value is None else value.to(device) for value in vars(self).values()))

    def chunks(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Row numbers (b,), at most `batch_size` at a time."""
        yield from torch.arange(len(self)).split(batch_size)

    def at(self, positions: str | torch.Tensor) -> torch.Tensor:
        """Positions as a boolean tensor (n, length). Raises `TracingError` for a row without any."""
        if isinstance(positions, torch.Tensor):
            if positions.dtype != torch.bool or positions.shape != self.tokens.shape:
                raise TracingError(
                    f"positions {positions.dtype} {tuple(positions.shape)}: a tensor must be boolean and "
                    f"(n, length) = {tuple(self.tokens.shape)}"
                )
            # here rows without a position are allowed: that is how to edit some rows only
            if not positions.any():
                raise TracingError("positions: the boolean tensor selects nothing")
            return positions.cpu()
        if positions == "all":
            return self.mask
        columns = torch.arange(self.tokens.shape[1])
        if positions == "subject":
            start, stop = self._subject().unbind(-1)
            return (columns >= start[:, None]) & (columns < stop[:, None])
        return columns == self.index(positions)[:, None]

    def index(self, positions: str | torch.Tensor) -> torch.Tensor:
        """One position a row, (n,): `"last"`, `"subject_first"`, `"subject_last"` or an index tensor."""
        if isinstance(positions, torch.Tensor):
            if positions.dtype == torch.bool or positions.is_floating_point() or positions.shape != self.last.shape:
                raise TracingError(
                    f"positions {positions.dtype} {tuple(positions.shape)}: a tensor to read at must hold "
                    f"one index a row, ({len(self)},)"
                )
            if positions.min() < 0 or positions.max() >= self.tokens.shape[1]:
                raise TracingError(f"positions: an index lies outside 0 to {self.tokens.shape[1] - 1}")
            return positions.long().cpu()
        if positions == "last":
            return self.last
        if positions in ("subject_first", "subject_last"):
            start, stop = self._subject().unbind(-1)
            return start if positions == "subject_first" else stop - 1
        if positions in POSITIONS:
            raise TracingError(f"positions {positions!r} are several a row; to read them, read all (None) and select")
        raise TracingError(f"positions {positions!r}: allowed are {', '.join(POSITIONS)} or a tensor")

    def _subject(self) -> torch.Tensor:
        if self.subject is None:
            raise TracingError("positions: these prompts have no subject")
        start, stop = self.subject.unbind(-1)
        empty = ((start < 0) | (start >= stop) | (stop > self.tokens.shape[1])).nonzero().flatten()
        if len(empty):
            raise TracingError(f"positions: no subject tokens in row {int(empty[0])} ({len(empty)} such rows)")
        return self.subject
