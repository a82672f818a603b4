"""Models and prompts to time things on: real architectures with random weights, so that no download is needed.

What a pass costs does not depend on what a model has learned. Weights are drawn large enough for every part to matter
(a freshly initialised model hardly depends on its attention), so that equal numbers mean something.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from helpers.facts import Fact, Relation
from helpers.localization.counterfactual import Pairs
from helpers.models import Model
from helpers.promptsets import PromptSet

SPECIAL = ("<pad>", "<bos>", "<eos>")
SUBJECT = 2  # tokens of a subject, with which every prompt begins


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, and how many prompts of how many tokens it is timed on."""

    name: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_mlp: int
    vocab_size: int
    prompts: int
    length: int = 21

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", n_layers=12, n_heads=6, n_kv_heads=2, d_model=192, d_mlp=448, vocab_size=1024, prompts=64),
        Shape("large", n_layers=28, n_heads=16, n_kv_heads=8, d_model=256, d_mlp=704, vocab_size=1024, prompts=16),
    )
}


def build(shape: Shape, seed: int = 0) -> Model:
    """A Llama of this shape on the CPU in float32, eager attention, frozen, with a tokenizer of one token a word."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        max_position_embeddings=4 * shape.length,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    hf = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # a norm: near where it starts
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return Model.of(hf.eval().requires_grad_(False), _tokenizer(shape.vocab_size), shape.name)


def pairs(shape: Shape, seed: int = 0) -> Pairs:
    """Clean and corrupted prompts of random tokens, as many and as long as the shape says.

    They differ in the subject, which comes first: nothing is left out of a sweep over positions.
    """
    n = shape.prompts
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randint(len(SPECIAL), shape.vocab_size, size, generator=generator)

    clean = draw(n, shape.length)
    corrupted = clean.clone()
    corrupted[:, :SUBJECT] = draw(n, SUBJECT)
    answers = torch.stack([len(SPECIAL) + torch.randperm(shape.vocab_size - len(SPECIAL), generator=generator)[:2] for _ in range(n)])
    return Pairs(_prompts(clean, answers, "clean"), _prompts(corrupted, answers.flip(1), "corrupted"))


def _prompts(tokens: torch.Tensor, answers: torch.Tensor, name: str) -> PromptSet:
    n, length = tokens.shape
    relation = Relation("random", "{subject} and random words")
    return PromptSet(
        facts=tuple(Fact(f"{name} {row}", relation, "true", "false") for row in range(n)),
        format="random",
        texts=tuple(" ".join(map(str, row)) for row in tokens.tolist()),
        tokens=tokens,
        mask=torch.ones_like(tokens),
        last=torch.full((n,), length - 1),
        subject=torch.tensor([[0, SUBJECT]]).expand(n, 2),
        option_ids=answers,
        option_tokens=tuple(tuple((token,) for token in row) for row in answers.tolist()),
    )


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), vocab_size))]
    by_word = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<eos>"))
    by_word.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=by_word, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
