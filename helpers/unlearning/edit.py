"""An edit: the new values of some weights of one model, kept apart from the model.

    edit = finetune(model, split, mask, "edit")     # the model is as it was; the edit is an object
    with edit.applied(model):
        ...                                         # here the model answers as edited
    edit.save(path)                                 # Edit.load(path) gives it back
    edit.export(model, folder)                      # an ordinary checkpoint of the edited model

However the block is left, every weight is back bit for bit. Edits can be nested when one was made on top of
the other, as in sequential editing: each is applied to the very weights it was made for, or refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from helpers import provenance
from helpers.masks import Mask
from helpers.models import Model

FORMAT = "edit 1"


class EditError(ValueError):
    """An edit that cannot be made, read, or applied to this model."""


@dataclass(frozen=True, eq=False)
class Edit:
    """New values of the masked weights, in the model's dtype, on the CPU.

    `values` maps a parameter's name to all of it, or to its selected weights (1-D, in the order of
    `parameter[part]`) where `parts` holds a boolean tensor instead of None. `base` fingerprints the weights
    that were replaced (sha256), `rest` all others of the model (a sum over their bits: fast, and enough to
    notice other weights). `changes` has one row a parameter: n weights, norm of the change, the same
    relative to the norm of the old weights, largest change. `record` says how the edit was made; `history`
    is its training log, if it has one.
    """

    values: dict[str, torch.Tensor] = field(repr=False)
    parts: dict[str, torch.Tensor | None] = field(repr=False)
    base: dict[str, str] = field(repr=False)
    rest: dict[str, str] = field(repr=False)
    changes: pd.DataFrame = field(repr=False)
    record: dict
    history: pd.DataFrame = field(repr=False, default_factory=pd.DataFrame)

    @classmethod
    def of(cls, model: Model, mask: Mask, new: Mapping[str, torch.Tensor], record: dict, history: pd.DataFrame | None = None) -> Edit:
        """An edit of the model as it is now. `new` holds whole tensors; only what the mask selects is taken.

        Raises `EditError` for a missing or misshapen tensor and for values that are not finite in the model's
        dtype, `SelectionError` for a mask of another model.
        """
        mask.check(model)
        values, base, rows = {}, {}, []
        named = dict(model.hf.named_parameters())
        for name, part in mask.entries.items():
            old = named[name].detach()
            given = tuple(new[name].shape) if name in new else "none"
            if given != tuple(old.shape):
                raise EditError(f"{name}: new values of shape {tuple(old.shape)} are needed, got {given}")
            value = select(new[name].detach(), part).to("cpu", old.dtype, copy=True)
            if not value.isfinite().all():
                raise EditError(f"{name}: the new values are not finite numbers in {old.dtype}")
            values[name], base[name] = value, _fingerprint(old, exact=True)
            rows.append({"parameter": name, **_change(select(old, part).cpu(), value)})
        rest = {name: _fingerprint(p.detach()) for name, p in named.items() if name not in base}
        record = {"model": model.name, "mask": mask.name, "mask_digest": mask.digest, "units": list(mask.units), **record}
        parts = {name: None if part is None else part.cpu().clone() for name, part in mask.entries.items()}
        return cls(values, parts, base, rest, pd.DataFrame(rows), record, pd.DataFrame() if history is None else history)

    @property
    def n_weights(self) -> int:
        """How many weights the edit may change."""
        return sum(value.numel() for value in self.values.values())

    @property
    def norm(self) -> float:
        """Euclidean norm of the whole change."""
        return float((self.changes["norm"] ** 2).sum() ** 0.5)

    def check(self, model: Model) -> None:
        """Raise `EditError`, naming a parameter, unless the model has just the weights the edit was made for."""
        named = dict(model.hf.named_parameters())
        for name, wanted in {**self.base, **self.rest}.items():
            found = _fingerprint(named[name].detach(), exact=name in self.base) if name in named else "absent"
            if found == wanted:
                continue
            (dtype, shape, _), (has, size, *_) = wanted.split(), f"{found} - -".split()
            if (dtype, shape) != (has, size):
                what = f"it is {shape} {dtype} there and {size if size != '-' else ''} {has} here".replace("  ", " ")
            elif name in self.base:
                what = "its values differ"
            else:
                what = "its values differ, though the edit leaves it alone: an edit made on top of another goes inside that one"
            raise EditError(f"this edit of {self.record.get('model')!r} was made for other weights than {model.name!r} has now; "
                            f"{name}: {what}")

    def applied(self, model: Model) -> AbstractContextManager[Model]:
        """Within the block, `model` has the edited weights; after it, the old ones, bit for bit.

        The old weights wait on the CPU, so that a GPU holds nothing twice. What the block does to the parameters
        that the edit touches (an attack may train them) is undone too. Raises `EditError` on entry for a model with other
        weights, and on exit when edits are not closed in the reverse order; then nothing is restored yet.
        """
        return _Applied(self, model)

    def save(self, path: Path | str) -> None:
        """Write the edit to one safetensors file, in one step."""
        arrays = {f"value:{name}": value.contiguous() for name, value in self.values.items()}
        arrays |= {f"part:{name}": part for name, part in self.parts.items() if part is not None}
        record = self.record
        if "provenance" not in record:
            git = provenance.git_state(provenance.project_root())
            record = {**record, "provenance": {"git": git, **provenance.describe_machine()}}
        tables = {"changes": self.changes.to_dict("list"), "history": self.history.to_dict("list")}
        meta = {"base": self.base, "rest": self.rest, "record": record, **tables}
        meta = {"format": FORMAT, **{key: json.dumps(value) for key, value in meta.items()}}
        provenance.write_atomic(Path(path), lambda temporary: save_file(arrays, temporary, metadata=meta))

    @classmethod
    def load(cls, path: Path | str) -> Edit:
        """The edit in a file. Raises `EditError` for a file that holds none, or is damaged."""
        try:
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                arrays = {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise EditError(f"{path}: no readable edit ({' '.join(str(error).split())[:200]})") from error
        if meta.get("format") != FORMAT:
            raise EditError(f"{path}: the file holds no edit of this format ({FORMAT})")
        read = {key: json.loads(value) for key, value in meta.items() if key != "format"}
        values = {name: arrays[f"value:{name}"] for name in read["base"]}
        parts = {name: arrays.get(f"part:{name}") for name in read["base"]}
        return cls(values, parts, read["base"], read["rest"], pd.DataFrame(read["changes"]), read["record"], pd.DataFrame(read["history"]))

    def export(self, model: Model, folder: Path | str) -> Path:
        """Save the edited model as an ordinary transformers checkpoint, with `edit.json` beside it.

        Raises `EditError` for a folder that holds something already.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise EditError(f"{folder}: there is something already; give an empty or a new folder")
        temporary = folder.with_name(f".{os.getpid()}.{folder.name}")
        try:
            with self.applied(model):
                model.hf.save_pretrained(temporary)
            model.tokenizer.save_pretrained(temporary)
            provenance.write_json(temporary / "edit.json", self.record)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder


class _Applied(AbstractContextManager):
    def __init__(self, edit: Edit, model: Model):
        self.edit, self.model = edit, model

    def __enter__(self) -> Model:
        self.edit.check(self.model)
        named = dict(self.model.hf.named_parameters())
        self.parameters = {name: named[name] for name in self.edit.values}
        self.old = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        # a mark on the model: copied with it, never saved with it
        self.stack = self.model.hf.__dict__.setdefault("_applied_edits", [])
        self.stack.append(self.edit.record.get("method", "edit"))
        self.depth = len(self.stack)
        try:
            for name, parameter in self.parameters.items():
                put(parameter.data, self.edit.parts[name], self.edit.values[name])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self.model

    def __exit__(self, *_) -> None:
        if len(self.stack) != self.depth:
            raise EditError("edits end in the reverse of the order in which they began; close the later one first, then this one again")
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.old[name])
        self.stack.pop()


def select(tensor: torch.Tensor, part: torch.Tensor | None) -> torch.Tensor:
    """The masked weights of a parameter: all of it, or the selected ones, 1-D (a copy)."""
    return tensor if part is None else tensor[part.to(tensor.device)]


def put(tensor: torch.Tensor, part: torch.Tensor | None, value: torch.Tensor) -> None:
    """Write masked weights back in place; no other weight is touched."""
    if part is None:
        tensor.copy_(value)
    else:
        tensor[part.to(tensor.device)] = value.to(tensor.device, tensor.dtype)


def _fingerprint(tensor: torch.Tensor, exact: bool = False) -> str:
    """dtype, shape and a digest of the bits: sha256 if `exact`, else their sum, taken where the tensor is."""
    bits = tensor.contiguous().view(-1)
    if exact:
        digest = hashlib.sha256(bits.cpu().view(torch.uint8).numpy()).hexdigest()
    else:
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        digest = int(bits.view(integers).sum(dtype=torch.int64))
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'} {digest}"


def _change(old: torch.Tensor, new: torch.Tensor) -> dict[str, float]:
    old, change = old.double(), new.double() - old.double()
    norm, before = change.norm().item(), old.norm().item()
    relative = norm / before if before else float("inf")
    return {"weights": new.numel(), "norm": norm, "relative": relative, "largest": change.abs().max().item()}
