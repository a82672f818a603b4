"""Tiny random models of every supported family, and prompts for them.

Three layers and random weights large enough for every part to matter: the initialisation of a fresh
model is so small that a wrong attention pattern would hardly show in the logits. Two defaults have to
be overridden whatever the width: Gemma's head_dim 256 and Gemma2's query_pre_attn_scalar 256.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

VOCABULARY = 64
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GROUPED = dict(num_key_value_heads=2, head_dim=8)
FAMILIES = ("llama", "gemma", "gemma2", "qwen3", "neox")


def config(family: str, **changes) -> PreTrainedConfig:
    """The tiny configuration of a family; `changes` override single fields."""
    if family == "llama":
        return LlamaConfig(**COMMON | dict(num_key_value_heads=2) | changes)
    if family == "gemma":
        return GemmaConfig(**COMMON | dict(num_key_value_heads=1, head_dim=16) | changes)
    if family == "gemma2":
        # caps and window small enough to bite on prompts of nine tokens
        own = dict(query_pre_attn_scalar=8, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)
        return Gemma2Config(**COMMON | GROUPED | own | changes)
    if family == "qwen3":
        return Qwen3Config(**COMMON | GROUPED | changes)
    if family == "neox":
        # rotary_pct below 1 and biases, as in Pythia
        return GPTNeoXConfig(**COMMON | dict(rotary_pct=0.25, hidden_act="gelu") | changes)
    raise ValueError(f"family {family!r}: there are {', '.join(FAMILIES)}")


def build(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """A tiny model with random weights, frozen, eager attention, in evaluation mode."""
    hf = AutoModelForCausalLM.from_config(config(family, **changes), attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norms and biases: near where they start
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return hf.eval().requires_grad_(False)


def tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token a word: `<pad>`, `<bos>`, `<eos>`, then w3 … w63."""
    words = ["<pad>", "<bos>", "<eos>"] + [f"w{number}" for number in range(3, VOCABULARY)]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side=padding_side,
    )


def save(family: str, folder: Path, **changes) -> Path:
    """A tiny model and its tokenizer on disk, in transformers' format."""
    build(family, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Prompts:
    """The fields of a PromptSet that tracing uses."""

    tokens: torch.Tensor
    mask: torch.Tensor
    position_ids: torch.Tensor
    last: torch.Tensor
    subject: torch.Tensor


def prompts(padding: str = "right", lengths: tuple[int, ...] = (9, 6, 7, 9, 5), seed: int = 1) -> Prompts:
    """Random prompts of these lengths, each with a subject of two tokens that starts at its second."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    tokens = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    start = torch.tensor([width - length if padding == "left" else 0 for length in lengths])
    for row, length in enumerate(lengths):
        real = slice(int(start[row]), int(start[row]) + length)
        tokens[row, real] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, real] = 1
    return Prompts(
        tokens=tokens,
        mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        last=start + torch.tensor(lengths) - 1,
        subject=torch.stack([start + 1, start + 3], dim=1),
    )
