"""Where a decoder keeps its parts, found by looking at its modules.

Nothing here asks what a model is called. A part ("role") is looked for under the few names that
decoder families give it; what the modules themselves say (`in_features`, `head_dim`, whether a
second pair of norms is there) decides the rest. Llama, Gemma, Gemma2, Qwen3 and GPT-NeoX are
covered and tested, and so is what copies their layout. Anything else is refused with a list of
what was looked for and what was found instead, because a wrong guess would edit the wrong weights.

The description holds names and numbers only, no modules, so it is also valid for a copy of the model
and for a model on the meta device, before any weight has been loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel


class ModelError(ValueError):
    """A model that cannot be found, loaded or understood; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Sizes and module names of a decoder.

    `roles` maps a part of a block to its path inside the block, e.g. `"down" -> "mlp.down_proj"`.
    Parts a family lacks (`gate` in GPT-NeoX, `attn_post_norm` outside Gemma2) are absent, and a
    fused query/key/value matrix appears as `"qkv"` in place of `q`, `k` and `v`.
    """

    blocks_path: str = field(repr=False)
    embed_path: str = field(repr=False)
    unembed_path: str = field(repr=False)
    final_norm_path: str = field(repr=False)
    roles: dict[str, str] = field(repr=False)
    n_layers: int
    n_heads: int
    n_kv_heads: int  # fewer than n_heads under grouped-query attention
    d_head: int
    d_model: int
    d_mlp: int
    vocab_size: int
    parallel: bool  # attention and MLP both read the block's input (GPT-NeoX)
    tied: bool  # embedding and unembedding are one parameter
    embed_scale: float  # factor that the embedding module applies to its rows (Gemma), else 1
    attn_softcap: float | None  # cap c of attention scores, c·tanh(score / c), or None
    final_softcap: float | None  # the same for the logits


# role -> the names it goes by. A role is required unless another layout replaces it.
_IN_BLOCK = {
    "attention": ("self_attn", "attention"),
    "mlp": ("mlp",),
    "attn_norm": ("input_layernorm",),
}
_IN_ATTENTION = {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("o_proj", "dense")}
_FUSED_ATTENTION = {"qkv": ("query_key_value",), "o": _IN_ATTENTION["o"]}
_IN_MLP = {"gate": ("gate_proj",), "up": ("up_proj",), "down": ("down_proj",)}
_PLAIN_MLP = {"up": ("dense_h_to_4h",), "down": ("dense_4h_to_h",)}
# The same name, two jobs: `post_attention_layernorm` feeds the MLP in most families, but where a
# `pre_feedforward_layernorm` does that (Gemma2), it norms the attention's contribution instead.
_NORMS = {"mlp_norm": ("post_attention_layernorm",)}
_SANDWICH_NORMS = {
    "attn_post_norm": ("post_attention_layernorm",),
    "mlp_norm": ("pre_feedforward_layernorm",),
    "mlp_post_norm": ("post_feedforward_layernorm",),
}
_FINAL_NORM = {"final_norm": ("norm", "final_layer_norm")}


def read_structure(hf: PreTrainedModel) -> Structure:
    """Describe a causal language model of transformers.

    Raises `ModelError` naming each part that was looked for and what was found in its place, and
    the layer if one block is built differently from the first.
    """
    backbone_path = hf.base_model_prefix
    backbone = getattr(hf, backbone_path, None)
    if backbone is None or hf.get_output_embeddings() is None:
        raise ModelError(
            f"{type(hf).__name__} is no causal language model: looked for a backbone and an output "
            f"embedding, found {_names(hf)}."
        )
    blocks_name = _find_blocks(hf, backbone)
    blocks = getattr(backbone, blocks_name)
    roles = _block_roles(hf, blocks[0])
    for layer, block in enumerate(blocks):
        if _block_roles(hf, block) != roles:
            raise ModelError(f"{type(hf).__name__}: block {layer} is built differently from block 0.")

    def part(role: str) -> nn.Module:
        return blocks[0].get_submodule(roles[role])

    embed, unembed = hf.get_input_embeddings(), hf.get_output_embeddings()
    d_head = _head_width(hf, part("attention"))
    n_heads = part("o").in_features // d_head
    return Structure(
        blocks_path=f"{backbone_path}.{blocks_name}",
        embed_path=_path_of(hf, embed),
        unembed_path=_path_of(hf, unembed),
        final_norm_path=f"{backbone_path}.{_find(hf, backbone, _FINAL_NORM)['final_norm']}",
        roles=roles,
        n_layers=len(blocks),
        n_heads=n_heads,
        n_kv_heads=n_heads if "qkv" in roles else part("k").out_features // d_head,
        d_head=d_head,
        d_model=embed.embedding_dim,
        d_mlp=part("down").in_features,
        vocab_size=unembed.out_features,
        parallel=bool(getattr(blocks[0], "use_parallel_residual", False)),
        tied=embed.weight is unembed.weight,
        # the configured number: the module's own buffer holds no value on the meta device
        embed_scale=float(getattr(embed, "scalar_embed_scale", 1.0)),
        attn_softcap=getattr(part("attention"), "attn_logit_softcapping", None),
        # no module holds this one: the model's forward reads it from the configuration
        final_softcap=getattr(hf.config, "final_logit_softcapping", None),
    )


def _find_blocks(hf: PreTrainedModel, backbone: nn.Module) -> str:
    """Name of the list of blocks: the one module list whose members hold an attention."""
    lists = [
        name
        for name, module in backbone.named_children()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and any(hasattr(module[0], attention) for attention in _IN_BLOCK["attention"])
    ]
    if len(lists) != 1:
        raise ModelError(
            f"{type(hf).__name__} is not supported; Llama, Gemma, Gemma2, Qwen3 and GPT-NeoX are, and what is laid out like them. Looked in "
            f"its backbone for one list of blocks that hold {' or '.join(_IN_BLOCK['attention'])}, found {_names(backbone)}."
        )
    return lists[0]


def _block_roles(hf: PreTrainedModel, block: nn.Module) -> dict[str, str]:
    """Role -> path inside the block, for every part of one block."""
    sandwich = hasattr(block, "pre_feedforward_layernorm")
    roles = _find(hf, block, _IN_BLOCK | (_SANDWICH_NORMS if sandwich else _NORMS))
    attention, mlp = getattr(block, roles["attention"]), getattr(block, roles["mlp"])
    inside = {
        "attention": (attention, _FUSED_ATTENTION if hasattr(attention, "query_key_value") else _IN_ATTENTION),
        "mlp": (mlp, _PLAIN_MLP if hasattr(mlp, "dense_h_to_4h") else _IN_MLP),
    }
    for owner, (module, wanted) in inside.items():
        found = _find(hf, module, wanted)
        for role, name in found.items():
            if not isinstance(getattr(module, name), nn.Linear):
                kind = type(getattr(module, name)).__name__
                raise ModelError(f"{type(hf).__name__}: {name} should be a Linear, found a {kind}.")
        roles |= {role: f"{roles[owner]}.{name}" for role, name in found.items()}
    return roles


def _find(hf: PreTrainedModel, owner: nn.Module, wanted: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Role -> the name under which `owner` holds it; every role must be there."""
    children = dict(owner.named_children())
    found = {role: name for role, names in wanted.items() for name in names if name in children}
    missing = [f"{role} ({' or '.join(wanted[role])})" for role in wanted if role not in found]
    if missing:
        raise ModelError(
            f"{type(hf).__name__} is not supported: looked in {type(owner).__name__} for "
            f"{', '.join(missing)}, found {_names(owner)}. Supported are models laid out like "
            "Llama, Gemma, Gemma2, Qwen3 or GPT-NeoX (Pythia)."
        )
    return found


def _head_width(hf: PreTrainedModel, attention: nn.Module) -> int:
    width = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    if width is None:
        raise ModelError(
            f"{type(hf).__name__} is not supported: looked in {type(attention).__name__} for the "
            "width of a head (head_dim or head_size), found neither."
        )
    return width


def _names(module: nn.Module) -> str:
    """The children of a module, as an error message lists them."""
    children = [f"{name} ({type(child).__name__})" for name, child in module.named_children()]
    return ", ".join(children) or "no parts at all"


def _path_of(hf: PreTrainedModel, wanted: nn.Module) -> str:
    return next(path for path, module in hf.named_modules() if module is wanted)
