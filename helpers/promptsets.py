"""Prompts as a model takes them: token ids, padding, the subject's token span and the answers' ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from helpers.facts import Fact, row_numbers

TENSORS = ("tokens", "mask", "last", "subject", "option_ids")


class PromptError(ValueError):
    """A format that cannot be made for these facts or this tokenizer."""


@dataclass(frozen=True)
class Prompt:
    """One question as text. ``options``: the answers compared, true answer first, edit answer second."""

    fact: Fact
    text: str
    start: int  # character offset of the subject in text
    subject: str
    options: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PromptSet:
    """n prompts of one format, padded to a common length.

    tokens, mask  (n, length) token ids; 1 on real tokens, 0 on padding
    last          (n,) index of the last real token, where the answer is predicted
    subject       (n, 2) first and past-the-end token index of the subject
    option_ids    (n, k) first token of each option, true answer first, edit answer second; -1 where there is no
                  such option or an earlier one has the same first token
    option_tokens all tokens of each option, for whole-answer log-probabilities
    whole         True where first tokens do not tell the options apart (dashed spelling)
    """

    facts: tuple[Fact, ...]
    format: str
    texts: tuple[str, ...]
    tokens: torch.Tensor
    mask: torch.Tensor
    last: torch.Tensor
    subject: torch.Tensor
    option_ids: torch.Tensor
    option_tokens: tuple[tuple[tuple[int, ...], ...], ...]
    whole: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index) -> "PromptSet":
        """A subset by slice, row numbers or mask (one boolean a row)."""
        rows = row_numbers(index, len(self))
        per_row = {name: tuple(getattr(self, name)[i] for i in rows) for name in ("facts", "texts", "option_tokens")}
        return replace(self, **per_row, **{name: getattr(self, name)[rows] for name in TENSORS})

    @property
    def answer_ids(self) -> torch.Tensor:
        """(n,) first token of the true answer in this format (for MCQ its letter)."""
        return self.option_ids[:, 0]

    @property
    def edit_ids(self) -> torch.Tensor:
        """(n,) first token of the edit answer in this format."""
        return self.option_ids[:, 1]

    @property
    def position_ids(self) -> torch.Tensor:
        """(n, length) positions counted over real tokens: Llama and GPT-NeoX classes ignore the padding mask here."""
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def to(self, device) -> "PromptSet":
        """The same prompts with all tensors on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})


def tokenize(tokenizer, prompts: Sequence[Prompt], format: str = "custom", side: str = "right") -> PromptSet:
    """Token ids, padding, subject spans and answer ids for prompts.

    Padding is done here, on either side, so that no tokenizer state is touched. Needs a fast
    tokenizer (character offsets). Raises PromptError where the answer would change how the prompt
    itself is tokenized, or where true and edit answer share their first token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
    if side not in ("left", "right"):
        raise PromptError(f"side={side!r}: padding goes to the left or to the right")
    texts = [p.text for p in prompts]
    encoded = tokenizer(texts, return_offsets_mapping=True)
    ids, whole = encoded["input_ids"], format == "dashed"
    answers = _answer_tokens(tokenizer, prompts, ids)
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    length, k = max(map(len, ids)), max(len(p.options) for p in prompts)
    gaps = [length - len(row) if side == "left" else 0 for row in ids]
    padded = lambda row, gap, fill: [fill] * gap + row + [fill] * (length - gap - len(row))
    return PromptSet(
        tuple(p.fact for p in prompts), format, tuple(texts),
        tokens=torch.tensor([padded(row, gap, pad) for row, gap in zip(ids, gaps)]),
        mask=torch.tensor([padded([1] * len(row), gap, 0) for row, gap in zip(ids, gaps)]),
        last=torch.tensor([gap + len(row) - 1 for row, gap in zip(ids, gaps)]),
        subject=torch.tensor([_span(p, offsets) for p, offsets in zip(prompts, encoded["offset_mapping"])]) + torch.tensor(gaps)[:, None],
        option_ids=torch.tensor([_first_tokens(p, options, k, whole) for p, options in zip(prompts, answers)]),
        option_tokens=answers, whole=whole)


def _span(prompt: Prompt, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """First and past-the-end token of the subject, from the tokens' character offsets."""
    end = prompt.start + len(prompt.subject)
    inside = [t for t, (a, b) in enumerate(offsets) if a < end and b > max(a, prompt.start)]
    if not inside:
        raise PromptError(f"the tokenizer leaves nothing of the subject {prompt.subject!r}")
    return inside[0], inside[-1] + 1


def _first_tokens(prompt: Prompt, options: Sequence[tuple[int, ...]], k: int, whole: bool) -> list[int]:
    """k first tokens; -1 for a distractor that cannot be told from an earlier option and must not be counted twice."""
    firsts = [tokens[0] for tokens in options]
    if firsts[0] == firsts[1] and not whole:
        raise PromptError(f"{prompt.fact.subject!r}: the answers {prompt.options[0]!r} and {prompt.options[1]!r} share "
                          "their first token; choose another edit answer")
    told_apart = [t if j < 2 or t not in firsts[:j] else -1 for j, t in enumerate(firsts)]
    return told_apart + [-1] * (k - len(firsts))


def _answer_tokens(tokenizer, prompts: Sequence[Prompt], ids: list[list[int]]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Tokens that each option adds after its prompt; the seam is checked for every option after every last word."""
    ends = [p.text.split()[-1] for p in prompts]
    home = {(end, option): i for i, (end, p) in enumerate(zip(ends, prompts)) for option in p.options}
    joined = tokenizer([f"{prompts[i].text} {option}" for (_, option), i in home.items()])["input_ids"]
    tokens = {}
    for ((end, option), i), row in zip(home.items(), joined):
        prompt = ids[i]
        if tokenizer.eos_token_id is not None and prompt[-1] == tokenizer.eos_token_id == row[-1]:
            raise PromptError("this tokenizer ends every text with its end-of-text token; set add_eos_token=False")
        if row[: len(prompt)] != prompt or len(row) == len(prompt):
            raise PromptError(f"the answer {option!r} changes how {prompts[i].text[-30:]!r} before it is tokenized")
        tokens[end, option] = tuple(row[len(prompt):])
    return tuple(tuple(tokens[end, option] for option in p.options) for end, p in zip(ends, prompts))
