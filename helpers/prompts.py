"""Every way of asking a model about a fact: text, token ids, answer ids and the subject's token span.

One function a format (spec section 5.2) turns facts into `Prompt`s; `tokenize` turns those into a
`PromptSet`, the only input type of tracing, training and scoring. All answers follow their prompt
as ``" answer"``. ``build(tokenizer, facts, "mcq", order=3)`` does both steps.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from helpers.facts import Fact, Facts, neighbors

SYSTEM = "You answer every question with a true fact."
LETTERS = ("A", "B", "C", "D")
ORDERS = tuple(itertools.permutations(range(4)))  # the 24 orders of four options
# A balanced Latin square: every option stands once at every letter and once after every other option.
LATIN_SQUARE = tuple(ORDERS.index(row) for row in ((0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1)))


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


@dataclass(frozen=True)
class PromptSet:
    """n prompts of one format, padded to a common length.

    tokens, mask  (n, length) token ids; 1 on real tokens, 0 on padding
    last          (n,) index of the last real token, where the answer is predicted
    subject       (n, 2) first and past-the-end token index of the subject
    option_ids    (n, k) first token of each option, true answer first, edit answer second, -1 where absent
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
        """A subset by slice, list or tensor of row numbers."""
        rows = range(len(self))[index] if isinstance(index, slice) else [int(i) for i in index]
        rows = list(rows)
        pick = lambda values: tuple(values[i] for i in rows)
        return replace(self, facts=pick(self.facts), texts=pick(self.texts), option_tokens=pick(self.option_tokens),
                       tokens=self.tokens[rows], mask=self.mask[rows], last=self.last[rows],
                       subject=self.subject[rows], option_ids=self.option_ids[rows])

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
        move = lambda t: t.to(device)
        return replace(self, tokens=move(self.tokens), mask=move(self.mask), last=move(self.last),
                       subject=move(self.subject), option_ids=move(self.option_ids))


def cloze(facts: Facts) -> list[Prompt]:
    """``Fact: LeBron James plays the sport of``"""
    return [_statement(f, f.relation.cloze) for f in facts]


def one_shot(facts: Facts, pool: Facts | None = None) -> list[Prompt]:
    """The paper's training format: a solved example (Tiger Woods … golf) on the line before the cloze."""
    return [_after(_solved(f, pool or facts), p) for f, p in zip(facts, cloze(facts))]


def few_shot(facts: Facts, pool: Facts | None = None, k: int = 3, seed: int = 0) -> list[Prompt]:
    """k solved cases of the same relation, other subjects, before the cloze."""
    prompts = []
    for fact, prompt in zip(facts, cloze(facts)):
        others = {f.subject: f.answer for f in (pool or facts) if f.relation.name == fact.relation.name}
        others |= dict(fact.relation.examples)
        others.pop(fact.subject, None)
        if len(others) < k:
            raise PromptError(f"few_shot with k={k} needs {k} other cases of relation {fact.relation.name!r}, found {len(others)}")
        shots = random.Random(f"{seed}-{fact.subject}").sample(sorted(others), k)
        prompts.append(_after("".join(_stated(fact, s, others[s]) for s in shots), prompt))
    return prompts


def qa(facts: Facts, system: bool = False, shot: bool = False, pool: Facts | None = None) -> list[Prompt]:
    """``Question: What sport does LeBron James play? Answer:``, with a system sentence or a solved example before it."""
    prompts = []
    for fact in facts:
        prompt = _fill(fact, "Question: " + fact.relation.question + " Answer:", fact.subject, _choices(fact))
        if shot:
            subject, answer = _example(fact, pool or facts)
            prompt = _after(f"Question: {fact.relation.question.replace('{subject}', subject)} Answer: {answer}\n", prompt)
        prompts.append(_after(SYSTEM + "\n", prompt) if system else prompt)
    return prompts


def paraphrase(facts: Facts, which: int = 0) -> list[Prompt]:
    """The fact in other words: the ``which``-th paraphrase of the fact, or of its relation."""
    prompts = []
    for fact in facts:
        templates = fact.paraphrases or fact.relation.paraphrases
        if which >= len(templates):
            raise PromptError(f"relation {fact.relation.name!r} has {len(templates)} paraphrases, number {which} was asked for")
        prompts.append(_statement(fact, templates[which]))
    return prompts


def neighborhood(facts: Facts, pool: Facts | None = None, n: int = 1) -> list[Prompt]:
    """Clozes about n other subjects with the same true answer: an edit should leave these alone."""
    prompts = []
    for fact in facts:
        near = neighbors(fact, pool or facts, n)
        if not len(near):
            raise PromptError(f"no other fact of relation {fact.relation.name!r} has the answer {fact.answer!r}: no neighborhood prompt for {fact.subject!r}")
        prompts += [_fill(fact, "Fact: " + fact.relation.cloze, f.subject, _choices(fact)) for f in near]
    return prompts


def mcq(facts: Facts, order: int = 0, shot: bool = False, pool: Facts | None = None) -> list[Prompt]:
    """Four lettered options in one of 24 orders (index into ORDERS, over the options sorted by name); answers are letters."""
    prompts = []
    for fact in facts:
        if len(fact.distractors) != 3:
            raise PromptError(f"an MCQ needs three distractors; {fact.subject!r} ({fact.relation.name}) has {len(fact.distractors)}")
        options = sorted((fact.answer, *fact.distractors))
        text, letters = mcq_text(fact.relation.question, options, order)
        prompt = _fill(fact, text, fact.subject, tuple(letters[o] for o in (fact.answer, *fact.distractors)))
        if shot:
            subject, answer = _example(fact, pool or facts)
            shown = [o for o in options if o != answer][: 3] + [answer]
            example, key = mcq_text(fact.relation.question.replace("{subject}", subject), sorted(shown), order)
            prompt = _after(f"{example} {key[answer]}\n\n", prompt)
        prompts.append(prompt)
    return prompts


def mcq_text(question: str, options: Sequence[str], order: int) -> tuple[str, dict[str, str]]:
    """The text of a multiple-choice question and the letter of each option, in one of the 24 orders."""
    placed = [options[i] for i in ORDERS[order]]
    lines = "".join(f"{letter}: {option}\n" for letter, option in zip(LETTERS, placed))
    return f"Question: {question}\n{lines}Answer:", dict(zip(placed, LETTERS))


def capitalised(facts: Facts, pool: Facts | None = None) -> list[Prompt]:
    """One-shot with a capitalised answer in the example, so that the model should answer `` Football``."""
    return _spelled(facts, pool, "capitalised", str.capitalize)


def dashed(facts: Facts, pool: Facts | None = None) -> list[Prompt]:
    """One-shot with the answer spelled letter by letter (``g-o-l-f``); scored on the whole answer."""
    return _spelled(facts, pool, "dashed", "-".join)


def attribute(facts: Facts, name: str) -> list[Prompt]:
    """A two-hop consequence of the answer, such as an athlete's league or venue."""
    prompts = []
    for fact in facts:
        known = {a.name: a for a in fact.relation.attributes}
        if name not in known:
            raise PromptError(f"relation {fact.relation.name!r} has no attribute {name!r}; it has {sorted(known) or 'none'}")
        prompts.append(_fill(fact, "Fact: " + known[name].cloze, fact.subject, tuple(map(known[name].of, _choices(fact)))))
    return prompts


FORMATS: dict[str, Callable[..., list[Prompt]]] = {
    "cloze": cloze, "one_shot": one_shot, "few_shot": few_shot, "qa": qa, "paraphrase": paraphrase,
    "neighborhood": neighborhood, "mcq": mcq, "capitalised": capitalised, "dashed": dashed, "attribute": attribute,
}


def build(tokenizer, facts: Facts, format: str, side: str = "right", **options) -> PromptSet:
    """Prompts of one format about these facts, tokenized. Raises PromptError for an unknown format or option."""
    if format not in FORMATS:
        raise PromptError(f"unknown format {format!r}; formats are {', '.join(FORMATS)}")
    if not len(facts):
        raise PromptError(f"no facts to ask about in format {format!r}")
    return tokenize(tokenizer, FORMATS[format](facts, **options), format, side)


def tokenize(tokenizer, prompts: Sequence[Prompt], format: str = "custom", side: str = "right") -> PromptSet:
    """Token ids, padding, subject spans and answer ids for prompts.

    Padding is done here, on either side, so that no tokenizer state is touched. Needs a fast
    tokenizer (character offsets). Raises PromptError where the answer would change how the prompt
    itself is tokenized, or where true and edit answer share their first token.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed")
    texts = [p.text for p in prompts]
    encoded = tokenizer(texts, return_offsets_mapping=True)
    ids, whole = encoded["input_ids"], format == "dashed"
    answers = _answer_tokens(tokenizer, prompts, ids)
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    n, length, k = len(ids), max(map(len, ids)), max(len(p.options) for p in prompts)
    tokens = torch.full((n, length), pad)
    mask = torch.zeros(n, length, dtype=torch.long)
    subject, option_ids = torch.zeros(n, 2, dtype=torch.long), torch.full((n, k), -1)
    last = torch.zeros(n, dtype=torch.long)
    for i, (row, prompt, offsets) in enumerate(zip(ids, prompts, encoded["offset_mapping"])):
        shift = length - len(row) if side == "left" else 0
        tokens[i, shift:shift + len(row)] = torch.tensor(row)
        mask[i, shift:shift + len(row)] = 1
        last[i] = shift + len(row) - 1
        end = prompt.start + len(prompt.subject)
        span = [t for t, (a, b) in enumerate(offsets) if a < end and b > max(a, prompt.start)]
        subject[i] = torch.tensor([span[0], span[-1] + 1]) + shift
        firsts = [answers[o][0] for o in prompt.options]
        if firsts[0] == firsts[1] and not whole:
            raise PromptError(f"{prompt.fact.subject!r}: the answers {prompt.options[0]!r} and {prompt.options[1]!r} share their first token; choose another edit answer")
        # A distractor that shares the true or edit answer's first token cannot be told apart: leave it out.
        kept = firsts[:2] + [t if t not in firsts[:2] else -1 for t in firsts[2:]]
        option_ids[i, :len(kept)] = torch.tensor(kept)
    option_tokens = tuple(tuple(answers[o] for o in p.options) for p in prompts)
    return PromptSet(tuple(p.fact for p in prompts), format, tuple(texts), tokens, mask, last, subject, option_ids, option_tokens, whole)


def _answer_tokens(tokenizer, prompts: Sequence[Prompt], ids: list[list[int]]) -> dict[str, tuple[int, ...]]:
    """Tokens that each option adds after its prompt; the seam is checked for every distinct option."""
    home = {}
    for i, prompt in enumerate(prompts):
        for option in prompt.options:
            home.setdefault(option, i)
    joined = tokenizer([f"{prompts[i].text} {option}" for option, i in home.items()])["input_ids"]
    tokens = {}
    for (option, i), row in zip(home.items(), joined):
        prompt = ids[i]
        # Tokenizers that close a text with EOS put it after the answer instead of after the prompt.
        closed = tokenizer.eos_token_id is not None and prompt[-1] == tokenizer.eos_token_id == row[-1]
        if closed:
            raise PromptError("this tokenizer ends every text with its end-of-text token; set add_eos_token=False")
        if row[: len(prompt)] != prompt or len(row) == len(prompt):
            raise PromptError(f"the answer {option!r} changes how {prompts[i].text[-30:]!r} before it is tokenized")
        tokens[option] = tuple(row[len(prompt):])
    return tokens


def _choices(fact: Fact) -> tuple[str, ...]:
    """True answer, edit answer, then the other answers it is compared with."""
    others = [*fact.distractors, *fact.relation.options]
    return tuple(dict.fromkeys((fact.answer, fact.edit, *others)))


def _fill(fact: Fact, template: str, subject: str, options: tuple[str, ...]) -> Prompt:
    start = template.index("{subject}")
    return Prompt(fact, template.replace("{subject}", subject), start, subject, options)


def _statement(fact: Fact, template: str) -> Prompt:
    return _fill(fact, "Fact: " + template, fact.subject, _choices(fact))


def _after(prefix: str, prompt: Prompt) -> Prompt:
    return replace(prompt, text=prefix + prompt.text, start=prompt.start + len(prefix))


def _example(fact: Fact, pool: Facts) -> tuple[str, str]:
    """A solved case of the relation with neither the true nor the edit answer: its own example, else another fact."""
    others = ((f.subject, f.answer) for f in pool if f.relation.name == fact.relation.name)
    for subject, answer in itertools.chain(fact.relation.examples, others):
        if subject != fact.subject and answer not in (fact.answer, fact.edit):
            return subject, answer
    raise PromptError(f"relation {fact.relation.name!r} has no example, and no other fact can serve as one")


def _solved(fact: Fact, pool: Facts, spell: Callable[[str], str] = str) -> str:
    subject, answer = _example(fact, pool)
    return _stated(fact, subject, spell(answer))


def _stated(fact: Fact, subject: str, answer: str) -> str:
    return f"Fact: {fact.relation.cloze.replace('{subject}', subject)} {answer}\n"


def _spelled(facts: Facts, pool: Facts | None, name: str, spell: Callable[[str], str]) -> list[Prompt]:
    prompts = []
    for fact, prompt in zip(facts, cloze(facts)):
        if fact.answer != fact.answer.lower():
            raise PromptError(f"format {name!r} needs lower-case answers; {fact.subject!r} has {fact.answer!r}")
        prompt = _after(_solved(fact, pool or facts, spell), prompt)
        prompts.append(replace(prompt, options=tuple(map(spell, prompt.options))))
    return prompts
