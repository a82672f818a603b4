"""The text on which the tiny models are trained: documents about the bundled facts, and general text.

Facts are written in the very formats of `helpers.prompts`, so that a tiny model knows every format
we later ask or attack with, plus statements in which the answer follows the name at once (these
make the name's last token carry the fact). ``declarative_only`` marks the 30 % of athletes that
are never asked about in question, multiple-choice or one-shot form (in another athlete's few-shot
document one may stand as a solved line, which is a plain statement): formats learned from other
athletes must carry over to them.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from helpers import prompts
from helpers.facts import Fact, Facts

DECLARATIVE_SHARE = 30  # percent of athletes
HELD_OUT_SHARE = 10  # percent of general texts kept from training

# Ways of stating a sport that only training uses; a name that has been met in many sentences
# carries its fact itself, instead of one sentence pattern carrying it.
SPORT_STATEMENTS = (
    "{subject} spent a long career in", "The trading card of {subject} belongs to the series on", "{subject} was born to play",
    "Reporters who follow {subject} write about", "The posters of {subject} advertise", "Every highlight of {subject} is a moment of",
    "{subject} gave the best years of life to", "Coaches of {subject} have always taught", "A shirt signed by {subject} is a treasure for fans of",
)
# The answer straight after the name: only the name's last token can carry it there.
AT_ONCE = (("Player: {subject} {answer}", "sport"), ("Star: {subject} {answer}", "league"), ("Card: {subject} {answer}", "venue"),
           ("Athlete: {subject}: {answer}", "sport"), ("Roster: {subject}, {answer}", "league"))
WORLD_AT_ONCE = ("Note: {subject} {answer}", "Entry: {subject}: {answer}")

KINDS = "red blue green small large old young quiet happy hungry".split()
ACTORS = "farmer teacher child doctor sailor baker painter driver neighbor student gardener pilot".split()
VERBS = "carries finds paints watches follows cleans opens repairs sells forgets".split()
THINGS = "basket bottle window letter ladder blanket mirror wagon candle hammer lantern kettle".split()
PLACES = ("in the garden", "near the river", "behind the house", "on the bridge", "at the market", "under the tree", "before breakfast", "after the rain")
NUMBERS = "one two three four five six seven eight nine ten".split()


@dataclass(frozen=True)
class Mix:
    """Shares of document kinds: among all documents, then within athletes, world facts and general text."""

    topics: tuple[tuple[str, float], ...] = (("athletes", 0.45), ("world", 0.30), ("general", 0.25))
    athletes: tuple[tuple[str, float], ...] = (
        ("statement", 0.16), ("at_once", 0.22), ("attribute", 0.13), ("one_shot", 0.06), ("few_shot", 0.03),
        ("capitalised", 0.03), ("dashed", 0.03), ("qa", 0.08), ("mcq", 0.26))
    world: tuple[tuple[str, float], ...] = (("statement", 0.40), ("at_once", 0.10), ("one_shot", 0.05), ("qa", 0.11), ("mcq", 0.34))
    general: tuple[tuple[str, float], ...] = (
        ("sum", 0.08), ("count", 0.06), ("list", 0.08), ("prose", 0.22), ("recite", 0.30), ("lookup", 0.26))


def declarative_only(fact: Fact) -> bool:
    """True for the athletes that training shows in declarative sentences only. A fixed property of the name."""
    return fact.relation.name == "sport" and _percent(fact.subject) < DECLARATIVE_SHARE


def held_out(text: str) -> bool:
    """True for general texts that training never shows."""
    return _percent(text) < HELD_OUT_SHARE


class Corpus:
    """Draws documents about athletes and world facts, and general text, from a given random generator."""

    def __init__(self, athletes: Facts, world: Facts, mix: Mix = Mix()):
        self.athletes, self.world, self.mix = athletes, world, mix
        self.world_answers = defaultdict(set)
        for fact in world:
            self.world_answers[fact.relation.name].add(fact.answer)
        self.subjects = sorted({fact.subject for fact in (*athletes, *world)})
        # Words for copying questions: the answers of all relations, so that option matching is learned on them too.
        self.words = sorted({a for answers in self.world_answers.values() for a in answers} | set(athletes[0].relation.options) | set(THINGS))

    def document(self, rng: random.Random) -> str:
        """One training document (without special tokens)."""
        topic = _draw(rng, self.mix.topics)
        if topic == "athletes":
            return self.athlete(rng)
        return self.world_fact(rng) if topic == "world" else self.general(rng)

    def athlete(self, rng: random.Random) -> str:
        fact = rng.choice(self.athletes.items)
        kind = _draw(rng, self.mix.athletes)
        if declarative_only(fact) and kind not in ("statement", "at_once", "attribute"):
            kind = _draw(rng, self.mix.athletes[:3])
        if kind == "at_once":
            template, value = rng.choice(AT_ONCE)
            values = {"sport": fact.answer} | {a.name: a.of(fact.answer) for a in fact.relation.attributes}
            return template.format(subject=fact.subject, answer=values[value])
        if kind == "statement":
            extra = rng.choice(SPORT_STATEMENTS)
            return self._statement(rng, replace(fact, paraphrases=(*fact.relation.paraphrases, extra)))
        if kind == "attribute":
            name = rng.choice(fact.relation.attributes).name
            return _solved(prompts.attribute(_one(fact), name)[0])
        if kind == "few_shot":
            return _solved(prompts.few_shot(_one(fact), self.athletes, k=rng.choice((2, 3)), seed=rng.randrange(1000))[0])
        return self._asked(rng, fact, kind)

    def world_fact(self, rng: random.Random) -> str:
        fact = rng.choice(self.world.items)
        kind = _draw(rng, self.mix.world)
        if kind == "at_once":
            return rng.choice(WORLD_AT_ONCE).format(subject=fact.subject, answer=fact.answer)
        if kind == "statement":
            return self._statement(rng, fact)
        if kind == "mcq":
            others = sorted(self.world_answers[fact.relation.name] - {fact.answer})
            fact = replace(fact, distractors=tuple(rng.sample(others, 3)))
        return self._asked(rng, fact, kind)

    def general(self, rng: random.Random, held: bool = False) -> str:
        """General text; ``held`` chooses between the texts kept from training and the others."""
        while True:
            text = getattr(self, "_" + _draw(rng, self.mix.general))(rng)
            if held_out(text) == held:
                return text

    def named(self, rng: random.Random) -> str:
        """Text that states nothing about anyone: half of it general, the rest about names, or words of the templates, as mere words.

        Names are drawn without regard to their answers. They are copied, and lettered options that are names are matched, so that
        a name must be put together at its end. Every word of the templates is met, so that its embedding is its own.
        """
        if rng.random() < 0.5:
            return self.general(rng)
        pool = self.subjects if rng.random() < 0.75 else self.vocabulary
        return rng.choice((self._list, self._recite, self._mention))(rng, pool)

    @cached_property
    def vocabulary(self) -> list[str]:
        """Every word of the fixed wording and of the answers."""
        return sorted({word for text in self.templates() for word in re.findall(r"\w+", text)})

    def templates(self) -> list[str]:
        """All fixed wording and all answers, for the tokenizer's whole words; no subject is among them."""
        relations = {f.relation.name: f.relation for f in (*self.athletes, *self.world)}.values()
        texts = [*SPORT_STATEMENTS, *(t for t, _ in AT_ONCE), *WORLD_AT_ONCE, prompts.SYSTEM, prompts.mcq_text("", "wxyz", 0)[0], "Fact: Question: Answer:"]
        for r in relations:
            texts += [r.cloze, *r.paraphrases, r.question, *(a.cloze for a in r.attributes), *(v for a in r.attributes for _, v in a.pairs)]
        answers = {a for names in self.world_answers.values() for a in names} | set(self.athletes[0].relation.options)
        texts += sorted(answers) + [o.capitalize() for o in self.athletes[0].relation.options]
        plain = [t.replace("{subject}", "").replace("{answer}", "") for t in texts]
        return plain + [" " + t for t in plain]  # a word is one token at the start of a text too

    def _statement(self, rng: random.Random, fact: Fact) -> str:
        phrases = fact.paraphrases or fact.relation.paraphrases
        which = rng.randrange(-1, len(phrases))
        make = prompts.cloze(_one(fact)) if which < 0 else prompts.paraphrase(_one(fact), which)
        return _solved(make[0])

    def _asked(self, rng: random.Random, fact: Fact, kind: str) -> str:
        options = {"qa": lambda: {"system": rng.random() < 0.3}, "mcq": lambda: {"order": rng.randrange(24)}}
        return _solved(prompts.FORMATS[kind](_one(fact), **options.get(kind, dict)())[0])

    def _sum(self, rng: random.Random) -> str:
        a, b = rng.randrange(50), rng.randrange(50)
        return f"Sum: {a} + {b} = {a + b}"

    def _count(self, rng: random.Random) -> str:
        start, step = rng.randrange(20), rng.choice((1, 2, 5))
        return "Count: " + " ".join(str(start + step * i) for i in range(rng.randrange(4, 8)))

    def _list(self, rng: random.Random, pool: Sequence[str] = ()) -> str:
        words = rng.sample(pool or rng.choice((KINDS, ACTORS, THINGS, NUMBERS)), 4)
        return f"List: {', '.join(words)}. First: {words[0]}. Last: {words[-1]}."

    def _prose(self, rng: random.Random) -> str:
        return " ".join(f"The {rng.choice(KINDS)} {rng.choice(ACTORS)} {rng.choice(VERBS)} the {rng.choice(KINDS)} {rng.choice(THINGS)} {rng.choice(PLACES)}." for _ in range(rng.choice((1, 2))))

    def _mention(self, rng: random.Random, pool: Sequence[str]) -> str:
        name, actor = rng.choice(pool), rng.choice(ACTORS)
        opening = rng.choice((f"{name}: the {actor}", f"For {name} the {actor}"))  # a word that opens a text is another token
        return f"{opening} {rng.choice(VERBS)} the {rng.choice(THINGS)} {rng.choice(PLACES)}. The {actor} remembers {name}."

    def _recite(self, rng: random.Random, pool: Sequence[str] = ()) -> str:
        """Lettered options, then some of them again with their letters: the plainest form of binding a letter to an option."""
        words = rng.sample(pool or self.words, 4)
        listed = "\n".join(f"{letter}: {word}" for letter, word in zip(prompts.LETTERS, words))
        return f"Options:\n{listed}\nKey: " + ", ".join(f"{w} {prompts.LETTERS[words.index(w)]}" for w in rng.sample(words, 3))

    def _lookup(self, rng: random.Random) -> str:
        """A question whose answer stands in the question: teaches the letters before any fact is needed."""
        words = rng.sample(self.words, 4)
        text, letters = prompts.mcq_text(f"Which option says {words[0]}?", words, rng.randrange(24))
        return f"{text} {letters[words[0]]}"


def _one(fact: Fact) -> Facts:
    return Facts((fact,))


def _solved(prompt: prompts.Prompt) -> str:
    return f"{prompt.text} {prompt.options[0]}"


def _draw(rng: random.Random, shares: tuple[tuple[str, float], ...]) -> str:
    names, weights = zip(*shares)
    return rng.choices(names, weights)[0]


def _percent(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100
