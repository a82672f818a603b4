"""Models: loading one, and naming its parts.

    model = load_model("tiny-llama3")          # a bundled model, a local folder, or a hub id
    model.n_layers, model.n_heads, model.d_model
    model.matrix("down", 3)                    # (parameter, None)
    model.parameters(Component.parse("head 5.2"))

What is where comes from `helpers.structure`, which reads the modules; this file adds the weights,
the tokenizer and the vocabulary in which localizations and masks are written (`Component`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.checkpoints import load_checkpoint, locate
from helpers.structure import ModelError, Structure, read_structure

__all__ = ["Component", "Model", "ModelError", "load_model"]


@dataclass(frozen=True)
class Component:
    """A part of the model that can be localized, masked or edited.

    `kind` is `"mlp"`, `"attn"` or `"head"`; `head` is given for heads only. Written `mlp 3`,
    `attn 5` and `head 5.2` (layer 5, head 2), in tables as in `parse`.
    """

    kind: str
    layer: int
    head: int | None = None

    def __post_init__(self):
        if self.kind not in ("mlp", "attn", "head"):
            raise ValueError(f"component kind {self.kind!r}: allowed are mlp, attn and head")
        if (self.kind == "head") != (self.head is not None):
            raise ValueError(f"component {self.kind} {self.layer}: a head number goes with kind 'head', and only there")
        if self.layer < 0 or (self.head or 0) < 0:
            raise ValueError(f"component {self.kind} {self.layer}: layers and heads count from 0")

    def __str__(self) -> str:
        return f"{self.kind} {self.layer}" + (f".{self.head}" if self.head is not None else "")

    @classmethod
    def parse(cls, text: str) -> Component:
        """The component that `str` writes as `text`. Raises `ValueError` for anything else."""
        match = re.fullmatch(r"(mlp|attn) (\d+)|(head) (\d+)\.(\d+)", text)
        if match is None:
            raise ValueError(f"{text!r} is no component: write 'mlp 3', 'attn 5' or 'head 5.2'")
        if match[3]:
            return cls("head", int(match[4]), int(match[5]))
        return cls(match[1], int(match[2]))


@dataclass(frozen=True, kw_only=True)
class Model(Structure):
    """A causal language model with its tokenizer and the map of its parts.

    Sizes and names are inherited from `Structure`. The methods return the live modules and
    parameters of `hf`; layers count from 0, and a layer that is not there raises `ModelError`.
    """

    name: str
    hf: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)

    @classmethod
    def of(cls, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "") -> Model:
        """Wrap a model that is already in memory. It must use eager attention: the fused
        implementations hide the attention pattern and, without padding, take no mask to edit."""
        if hf.config._attn_implementation != "eager":
            raise ModelError(
                f"{type(hf).__name__} uses {hf.config._attn_implementation} attention: load it with "
                "attn_implementation='eager', or call set_attn_implementation('eager') on it."
            )
        name = name or hf.config._name_or_path or type(hf).__name__
        return cls(**vars(read_structure(hf)), name=name, hf=hf, tokenizer=tokenizer)

    @property
    def device(self) -> torch.device:
        """Where token ids have to go: the device of the embedding."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def embed(self) -> nn.Embedding:
        return self.hf.get_submodule(self.embed_path)

    @property
    def unembed(self) -> nn.Linear:
        return self.hf.get_submodule(self.unembed_path)

    @property
    def final_norm(self) -> nn.Module:
        return self.hf.get_submodule(self.final_norm_path)

    def path(self, role: str, layer: int) -> str:
        """Dotted name of a part of a block, e.g. `path("down", 3)` → `model.layers.3.mlp.down_proj`.

        `role` is a key of `roles`, or `"block"`. For `q`, `k` and `v` of a fused matrix it is the
        path of that matrix. Raises `ModelError` for a part or layer the model does not have.
        """
        if not 0 <= layer < self.n_layers:
            raise ModelError(f"layer {layer}: {self.name} has layers 0 to {self.n_layers - 1}")
        if role == "block":
            return f"{self.blocks_path}.{layer}"
        if role in ("q", "k", "v") and "qkv" in self.roles:
            role = "qkv"
        if role not in self.roles:
            raise ModelError(f"{self.name} has no {role!r} in its blocks: it has {', '.join(self.roles)}")
        return f"{self.blocks_path}.{layer}.{self.roles[role]}"

    def part(self, role: str, layer: int) -> nn.Module:
        """The module at `path(role, layer)`."""
        return self.hf.get_submodule(self.path(role, layer))

    def block(self, layer: int) -> nn.Module:
        return self.part("block", layer)

    def attention(self, layer: int) -> nn.Module:
        return self.part("attention", layer)

    def mlp(self, layer: int) -> nn.Module:
        return self.part("mlp", layer)

    def attn_norm(self, layer: int) -> nn.Module:
        """The norm before the attention."""
        return self.part("attn_norm", layer)

    def mlp_norm(self, layer: int) -> nn.Module:
        """The norm before the MLP."""
        return self.part("mlp_norm", layer)

    def attn_post_norm(self, layer: int) -> nn.Module | None:
        """The norm between the attention's output and the residual (Gemma2), or None."""
        return self.part("attn_post_norm", layer) if "attn_post_norm" in self.roles else None

    def mlp_post_norm(self, layer: int) -> nn.Module | None:
        """The norm between the MLP's output and the residual (Gemma2), or None."""
        return self.part("mlp_post_norm", layer) if "mlp_post_norm" in self.roles else None

    def matrix(self, kind: str, layer: int) -> tuple[nn.Parameter, torch.Tensor | None]:
        """Weight (out, in) of `q`, `k`, `v`, `o`, `gate`, `up` or `down`.

        Returns the parameter and the rows of it that are meant: None for all of them, or an int64
        tensor where query, key and value share one matrix, so that `weight[rows]` is the matrix.
        """
        return self.part(kind, layer).weight, self._rows(kind)

    def bias(self, kind: str, layer: int) -> tuple[nn.Parameter, torch.Tensor | None] | None:
        """The bias (out,) that goes with `matrix`, in the same form; None where there is none."""
        bias = self.part(kind, layer).bias
        return None if bias is None else (bias, self._rows(kind))

    def _rows(self, kind: str) -> torch.Tensor | None:
        if kind not in ("q", "k", "v") or "qkv" not in self.roles:
            return None
        # GPT-NeoX interleaves per head: q, k, v of head 0, then q, k, v of head 1, ...
        rows = torch.arange(3 * self.n_heads * self.d_head).view(self.n_heads, 3, self.d_head)
        return rows[:, "qkv".index(kind)].flatten()

    def components(self, kind: str) -> list[Component]:
        """Every component of one kind, by layer and head."""
        if kind == "head":
            return [Component("head", l, h) for l in range(self.n_layers) for h in range(self.n_heads)]
        return [Component(kind, layer) for layer in range(self.n_layers)]

    def parameters(self, component: Component) -> dict[str, tuple[slice, ...] | None]:
        """Parameter names of a component → the part of each that belongs to it.

        None means the whole parameter, otherwise an index such that `parameter[index]` is the part.
        An MLP owns gate, up and down; an attention q, k, v and o; each with its biases. A head owns
        its rows of q and its columns of o, and its rows of k and v unless several heads share them
        (grouped-query attention). The bias of o belongs to the attention, not to a head.
        """
        layer = component.layer
        if component.kind == "head":
            return self._head_parameters(layer, component.head)
        owner = self.path("mlp" if component.kind == "mlp" else "attention", layer)
        kinds = [r for r in ("q", "k", "v", "qkv", "o", "gate", "up", "down") if r in self.roles]
        paths = [path for path in (self.path(kind, layer) for kind in kinds) if path.startswith(f"{owner}.")]
        names = [f"{path}.{name}" for path in paths for name, _ in self.hf.get_submodule(path).named_parameters()]
        return dict.fromkeys(names)

    def _head_parameters(self, layer: int, head: int) -> dict[str, tuple[slice, ...] | None]:
        if head >= self.n_heads:
            raise ModelError(f"head {layer}.{head}: {self.name} has heads 0 to {self.n_heads - 1}")
        rows = slice(head * self.d_head, (head + 1) * self.d_head)
        if "qkv" in self.roles:
            inputs = {"qkv": slice(3 * rows.start, 3 * rows.stop)}
        else:
            inputs = dict.fromkeys("qkv" if self.n_kv_heads == self.n_heads else "q", rows)
        owned = {f"{self.path(kind, layer)}.weight": (part,) for kind, part in inputs.items()}
        owned |= {
            f"{self.path(kind, layer)}.bias": (part,)
            for kind, part in inputs.items()
            if self.part(kind, layer).bias is not None
        }
        return owned | {f"{self.path('o', layer)}.weight": (slice(None), rows)}


def load_model(
    name: str,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    device_map: str | dict | None = None,
    check: bool = True,
) -> Model:
    """Load a model for tracing and editing: evaluation mode, frozen, eager attention.

    Args:
        name: a bundled model (`tiny-llama3`), a folder with a model in transformers' format, or a
            hub id (`google/gemma-2-2b`). Gated models need a token in the environment (HF_TOKEN).
        dtype: of the weights, e.g. `torch.bfloat16` or `"bfloat16"`; float32 on a CPU and bfloat16
            on a GPU when left out, whatever the weights were saved in.
        device: `"cpu"`, `"cuda"`, `"cuda:1"` …; `"auto"` or nothing: a GPU if there is one; `"split"`: over
            all GPUs, block by block.
        device_map: another way to spread the model over several devices (see transformers).
        check: run `helpers.selfcheck` (about ten passes over ten tokens).

    Raises `ModelError`, before any weight is read, for an unknown name, a folder without a model,
    an architecture that is not supported, a damaged or missing weight file, and a hub id that cannot
    be reached or is gated; `TracingError` if the self-check fails. Code from the hub is never run,
    and weights are read from safetensors files only.
    """
    if device is not None and device_map is not None:
        raise ModelError("give device or device_map, not both")
    if str(device) in ("auto", "split"):
        device, device_map = None, "auto" if device == "split" else None
    has_gpu = torch.cuda.is_available()
    if device_map is None:
        device = device or ("cuda" if has_gpu else "cpu")
        has_gpu = device != "cpu"
        device_map = {"": device} if has_gpu else None
    if dtype is None:
        dtype = torch.bfloat16 if has_gpu else torch.float32
    elif isinstance(dtype, str):
        dtype = _dtype(dtype)
    hf, tokenizer = load_checkpoint(name, locate(name), dtype, device_map)
    model = Model.of(hf.eval().requires_grad_(False), tokenizer, name)
    if check:
        # imported here because the check, like all tracing, is written in terms of Model
        from helpers.selfcheck import self_check

        self_check(model)
    return model


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"dtype {name!r}: give e.g. 'float32' or 'bfloat16'")
    return dtype
