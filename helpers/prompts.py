"""Every way of asking a model about a fact.

One function a format (spec section 5.2) turns facts into `Prompt`s, which are text; `tokenize` turns
those into a `PromptSet`, the only input type of tracing, training and scoring. All answers follow
their prompt as ``" answer"``. ``build(tokenizer, facts, "mcq", order=3)`` does both steps.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from helpers.facts import Fact, Facts
from helpers.promptsets import Prompt, PromptError, PromptSet, tokenize
from helpers.splits import neighbors

__all__ = ["FORMATS", "LATIN_SQUARE", "LETTERS", "ORDERS", "SYSTEM", "Prompt", "PromptError", "PromptSet", "askable", "build", "mcq_text",
           "tokenize"]

SYSTEM = "You answer every question with a true fact."
LETTERS = ("A", "B", "C", "D")
ORDERS = tuple(itertools.permutations(range(4)))  # the 24 orders of four options
# A balanced Latin square: every option stands once at every letter and once after every other option.
LATIN_SQUARE = tuple(ORDERS.index(row) for row in ((0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1)))


def cloze(facts: Facts) -> list[Prompt]:
    """``Fact: LeBron James plays the sport of``"""
    return [_statement(f, f.relation.cloze) for f in facts]


def one_shot(facts: Facts, pool: Facts | None = None) -> list[Prompt]:
    """The paper's training format: a solved example (Tiger Woods … golf) on the line before the cloze."""
    return [_after(_stated(f, *_example(f, pool or facts)), p) for f, p in zip(facts, cloze(facts))]


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
        if not 0 <= which < len(templates):
            raise PromptError(f"relation {fact.relation.name!r} has {len(templates)} paraphrases; which={which} is none of them")
        prompts.append(_statement(fact, templates[which]))
    return prompts


def neighborhood(facts: Facts, pool: Facts | None = None, n: int = 1) -> list[Prompt]:
    """Clozes about n other subjects with the same true answer: an edit should leave these alone.

    They come from ``pool`` (the retain set, or all facts), but never from the facts asked about, which an
    edit changes. Without a pool they come from those facts themselves: good for an unedited model only.
    """
    prompts, asked = [], {f.key for f in facts}
    others = facts if pool is None else pool.where(lambda f: f.key not in asked)
    for fact in facts:
        near = neighbors(fact, others, n)
        if not len(near):
            raise PromptError(f"no other fact of relation {fact.relation.name!r} has the answer {fact.answer!r}: no neighborhood prompt for {fact.subject!r}")
        prompts += [_fill(fact, "Fact: " + fact.relation.cloze, f.subject, _choices(fact)) for f in near]
    return prompts


def mcq(facts: Facts, order: int = 0, shot: bool = False, pool: Facts | None = None) -> list[Prompt]:
    """Four lettered options in one of 24 orders (index into ORDERS, over the options sorted by name); answers are letters."""
    if order not in range(len(ORDERS)):
        raise PromptError(f"order={order}: the orders of four options are numbered 0 to {len(ORDERS) - 1}")
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
    accepted = inspect.signature(FORMATS[format])
    try:
        accepted.bind(facts, **options)
    except TypeError as error:
        raise PromptError(f"format {format!r}: {error}; its options are {', '.join([*accepted.parameters][1:]) or 'none'}") from None
    return tokenize(tokenizer, FORMATS[format](facts, **options), format, side)


def askable(tokenizer, facts: Facts, format: str, **options) -> Facts:
    """The facts that can be asked in a format, in order: true and edit answer begin with different tokens, and what the format needs is there.

    Data from elsewhere has some that cannot. Raises PromptError where none can.
    """
    try:
        build(tokenizer, facts, format, **options)
        return facts
    except PromptError as error:
        found = facts.where(lambda fact: _can_ask(tokenizer, fact, format, options))
        if not len(found):
            raise error
        return found


def _can_ask(tokenizer, fact: Fact, format: str, options: dict) -> bool:
    try:
        build(tokenizer, Facts((fact,)), format, **options)
    except PromptError:
        return False
    return True


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
    raise PromptError(f"relation {fact.relation.name!r} has no solved case with an answer other than {fact.answer!r} and {fact.edit!r}: "
                      "give a larger pool, or add a row with the role 'example' and another answer to the facts file")


def _stated(fact: Fact, subject: str, answer: str) -> str:
    return f"Fact: {fact.relation.cloze.replace('{subject}', subject)} {answer}\n"


def _spelled(facts: Facts, pool: Facts | None, name: str, spell: Callable[[str], str]) -> list[Prompt]:
    """One-shot prompts with every answer respelled, the example's too."""
    prompts = []
    for fact, prompt in zip(facts, cloze(facts)):
        if any(option != option.lower() for option in prompt.options):
            raise PromptError(f"format {name!r} needs lower-case answers; {fact.subject!r} has {', '.join(prompt.options)}")
        subject, answer = _example(fact, pool or facts)
        prompt = _after(_stated(fact, subject, spell(answer)), prompt)
        prompts.append(replace(prompt, options=tuple(map(spell, prompt.options))))
    return prompts
