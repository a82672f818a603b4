"""Facts, the relations they belong to, and their splits into forget and retain sets.

A fact is a (subject, relation) pair with one true answer and one *edit answer*, fixed in the data
so that every method edits to the same false answer. Facts come from a CSV file with the columns
``subject, relation, answer`` (optional: ``edit_answer``, ``distractors``, ``paraphrases``, where
several values are joined by ``|``, and ``role``: rows marked ``example`` are the solved cases of
one-shot prompts, not facts to edit) and relation templates from a YAML file. What is missing is
derived from the other facts of the relation, or refused with a message naming row and column.
"""

from __future__ import annotations

import csv
import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

DATA = Path(__file__).resolve().parent.parent / "data"
BUNDLED = {"athletes": DATA / "athletes.csv", "world": DATA / "world.csv"}
REQUIRED = ("subject", "relation", "answer")
N_DISTRACTORS = 3


class FactsError(ValueError):
    """A facts or relations file, or a split asked of it, that cannot be served."""


@dataclass(frozen=True)
class Attribute:
    """A property that follows from the answer: an athlete's league follows from the sport."""

    name: str
    cloze: str
    pairs: tuple[tuple[str, str], ...]

    def of(self, answer: str) -> str:
        """The attribute's value for a fact with this answer. Raises FactsError if there is none."""
        values = dict(self.pairs)
        if answer not in values:
            raise FactsError(f"attribute {self.name!r} has no value for {answer!r}; it has {sorted(values)}")
        return values[answer]


@dataclass(frozen=True)
class Relation:
    """Templates of one relation. Each contains ``{subject}`` once and ends where the answer begins."""

    name: str
    cloze: str
    paraphrases: tuple[str, ...] = ()
    question: str = ""
    noun: str = "answer"
    examples: tuple[tuple[str, str], ...] = ()  # solved cases for one-shot prompts, e.g. (Tiger Woods, golf)
    options: tuple[str, ...] = ()  # the closed set of MCQ options, where the relation has one
    attributes: tuple[Attribute, ...] = ()


@dataclass(frozen=True)
class Fact:
    """One fact. ``distractors`` are wrong MCQ options; the first of them is the edit answer."""

    subject: str
    relation: Relation
    answer: str
    edit: str
    distractors: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        return self.subject, self.relation.name


@dataclass(frozen=True)
class Facts(Sequence):
    """An ordered set of facts, keyed by (subject, relation). Indexing by a slice or list gives Facts."""

    items: tuple[Fact, ...]
    name: str = "facts"

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.items)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Facts(self.items[index], self.name)
        if hasattr(index, "__iter__"):
            return Facts(tuple(self.items[int(i)] for i in index), self.name)
        return self.items[index]

    def where(self, keep) -> "Facts":
        """The facts for which ``keep(fact)`` is true, in order."""
        return Facts(tuple(f for f in self.items if keep(f)), self.name)

    def counts(self) -> Counter:
        """Number of facts per answer."""
        return Counter(f.answer for f in self.items)

    def answers(self, relation: str) -> tuple[str, ...]:
        """The distinct true answers of one relation, sorted."""
        return tuple(sorted({f.answer for f in self.items if f.relation.name == relation}))

    def digest(self) -> str:
        """Content hash of the facts (not of the file): equal facts in equal order, equal digest."""
        text = "\n".join("\t".join((*f.key, f.answer, f.edit, *f.distractors)) for f in self.items)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Split:
    """Forget and retain sets of one experiment, and the halves of the forget set used by attacks.

    ``forget`` is edited; ``attack_train`` / ``attack_test`` are its two halves, stratified by
    answer; ``retain_train`` / ``retain_test`` divide all other facts 80 / 20 in file order.
    """

    spec: str
    seed: int
    forget: Facts
    attack_train: Facts
    attack_test: Facts
    retain_train: Facts
    retain_test: Facts
    record: dict = field(default_factory=dict, compare=False)


def load(source: str | Path = "athletes", relations: str | Path | None = None, edit: str = "edit_answer") -> Facts:
    """Load a bundled set of facts (``athletes``, ``world``) or a CSV file.

    ``relations``: YAML file with the templates; by default ``<file>.yaml`` beside the CSV if there
    is one, else the bundled ``data/relations.yaml``. ``edit``: the column that holds the edit
    answer (athletes also have ``edit_answer_golf``). Raises FactsError.
    """
    path = BUNDLED.get(str(source), Path(source))
    if not path.is_file():
        raise FactsError(f"no facts at {source!r}: give one of {sorted(BUNDLED)} or the path of a CSV file with the columns {', '.join(REQUIRED)}")
    if relations is None:
        beside = path.with_suffix(".yaml")
        relations = beside if beside.is_file() else DATA / "relations.yaml"
    rows = _read_rows(path)
    if edit != "edit_answer" and edit not in rows[0][1]:
        raise FactsError(f"{path.name}: no column {edit!r} for edit answers; columns are {', '.join(rows[0][1])}")
    templates = load_relations(relations)
    examples = defaultdict(tuple)
    for line, row in rows:
        if row["relation"] not in templates:
            raise FactsError(f"{path.name}, row {line}, column relation: unknown relation {row['relation']!r}; {Path(relations).name} has {', '.join(sorted(templates))}")
        if row.get("role") == "example":
            examples[row["relation"]] += ((row["subject"], row["answer"]),)
    templates = {name: replace(r, examples=examples[name]) for name, r in templates.items()}
    asked = [(line, row) for line, row in rows if row.get("role") != "example"]
    return Facts(tuple(_complete(path, asked, templates, edit)), path.stem)


def load_relations(path: str | Path) -> dict[str, Relation]:
    """Relations by name from a YAML file. Raises FactsError naming relation and field."""
    path = Path(path)
    if not path.is_file():
        raise FactsError(f"no relation templates at {path}")
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise FactsError(f"{path.name}: expected a mapping of relation name to templates")
    return {name: _relation(path.name, name, spec) for name, spec in raw.items()}


def split(facts: Facts, forget: str = "first-64", seed: int = 0) -> Split:
    """Split facts as the paper does (spec section 1.1), with stratified halves for attacks.

    ``forget``: ``first-<n>`` (the first n facts), ``answer-<word>`` (all facts with that answer) or
    ``slice-<k>-of-<n>`` (the k-th run of n facts, from 0). The retain set is everything else.
    Raises FactsError for an unknown spec, an empty forget set or one that leaves nothing to retain.
    """
    chosen = _forget_indices(facts, forget)
    if not chosen:
        raise FactsError(f"forget={forget!r} selects no fact out of {len(facts)}; answers are {sorted(facts.counts())}")
    keys = {facts[i].key for i in chosen}
    rest = facts.where(lambda f: f.key not in keys)
    if len(rest) < 5:
        raise FactsError(f"forget={forget!r} takes {len(chosen)} of {len(facts)} facts and leaves {len(rest)} to retain; at least 5 are needed")
    cut = round(0.8 * len(rest))
    target = facts[chosen]
    first, second = halves(target, seed)
    record = {"forget": forget, "seed": seed, "facts": facts.digest(), "n_forget": len(target), "n_retain": len(rest),
              "attack_train": [f.subject for f in first], "forget_answers": dict(target.counts())}
    return Split(forget, seed, target, first, second, rest[:cut], rest[cut:], record)


def halves(facts: Facts, seed: int = 0) -> tuple[Facts, Facts]:
    """Two halves of the facts, stratified by answer: an answer with m facts has m/2 in each, give or take one.

    (In the paper's first-16 split the first half in file order has no basketball player.)
    """
    by_answer = defaultdict(list)
    for i, fact in enumerate(facts):
        by_answer[fact.answer].append(i)
    rng, first = random.Random(f"halves-{seed}"), []
    odd = 0
    for answer in sorted(by_answer):
        group = by_answer[answer]
        rng.shuffle(group)
        # Odd groups give their extra fact to the two halves in turn, so that the halves stay equal.
        take = (len(group) + (odd % 2 if len(group) % 2 else 0)) // 2
        odd += len(group) % 2
        first += group[:take]
    chosen = set(first)
    return facts[sorted(chosen)], facts[[i for i in range(len(facts)) if i not in chosen]]


def neighbors(fact: Fact, facts: Facts, n: int = 2) -> Facts:
    """Up to n other facts of the same relation with the same answer (CounterFact's neighborhood)."""
    same = [f for f in facts if f.relation.name == fact.relation.name and f.answer == fact.answer and f.subject != fact.subject]
    rng = random.Random(f"neighbors-{fact.subject}-{fact.relation.name}")
    return Facts(tuple(rng.sample(same, min(n, len(same)))), facts.name)


def _forget_indices(facts: Facts, spec: str) -> list[int]:
    kind, _, rest = spec.partition("-")
    if kind == "answer" and rest:
        return [i for i, f in enumerate(facts) if f.answer == rest]
    numbers = rest.split("-of-")
    if all(x.isdigit() for x in numbers) and (kind, len(numbers)) in (("first", 1), ("slice", 2)):
        size = int(numbers[-1])
        start = int(numbers[0]) * size if kind == "slice" else 0
        if start + size > len(facts):
            raise FactsError(f"forget={spec!r} needs {start + size} facts, but only {len(facts)} are there (or known to the model)")
        return list(range(start, start + size))
    raise FactsError(f"forget={spec!r} is not understood: use first-<n>, answer-<word> or slice-<k>-of-<n>")


def _relation(file: str, name: str, spec: dict) -> Relation:
    if not isinstance(spec, dict) or "cloze" not in spec:
        raise FactsError(f"{file}: relation {name!r} needs at least a 'cloze' template")
    spec = dict(spec)
    attributes = tuple(Attribute(k, v["cloze"], tuple(v["answers"].items())) for k, v in spec.pop("attributes", {}).items())
    unknown = set(spec) - {"cloze", "paraphrases", "question", "noun", "options"}
    if unknown:
        raise FactsError(f"{file}: relation {name!r} has unknown fields {sorted(unknown)}")
    templates = [spec["cloze"], *spec.get("paraphrases", []), *(a.cloze for a in attributes)]
    if spec.get("question"):
        templates.append(spec["question"])
    for template in templates:
        if template.count("{subject}") != 1 or template != template.rstrip():
            raise FactsError(f"{file}: relation {name!r}: template {template!r} must contain {{subject}} once and end without a space")
    # Without a question the cloze itself is asked: any relation can be put as question and answer.
    question = spec.get("question") or f"Which {spec.get('noun', 'answer')} completes this: {spec['cloze']} ...?"
    return Relation(name, spec["cloze"], tuple(spec.get("paraphrases", ())), question, spec.get("noun", "answer"),
                    options=tuple(spec.get("options", ())), attributes=attributes)


def _read_rows(path: Path) -> list[tuple[int, dict]]:
    """(line number, row) pairs, validated for columns, blanks and duplicate keys."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise FactsError(f"{path.name}, row {line}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    reader = csv.DictReader(text.splitlines())
    missing = [c for c in REQUIRED if c not in (reader.fieldnames or ())]
    if missing:
        raise FactsError(f"{path.name}: missing column(s) {', '.join(missing)}; found {', '.join(reader.fieldnames or ()) or 'none'}")
    rows, seen = [], {}
    for line, row in enumerate(reader, start=2):
        row = {k: (v or "").strip() for k, v in row.items() if k}
        for column in REQUIRED:
            if not row[column]:
                raise FactsError(f"{path.name}, row {line}, column {column}: empty")
        key = row["subject"], row["relation"]
        if key in seen:
            raise FactsError(f"{path.name}, row {line}: ({key[0]}, {key[1]}) stands in row {seen[key]} already")
        seen[key] = line
        rows.append((line, row))
    if not rows:
        raise FactsError(f"{path.name}: no facts")
    return rows


def _complete(path: Path, rows: list[tuple[int, dict]], templates: dict[str, Relation], edit: str) -> Iterator[Fact]:
    """Facts from rows; missing edit answers and distractors are drawn from the relation's other answers."""
    answers = defaultdict(Counter)
    for _, row in rows:
        answers[row["relation"]][row["answer"]] += 1
    for line, row in rows:
        relation, true = templates[row["relation"]], row["answer"]
        others = sorted((set(answers[relation.name]) | set(relation.options)) - {true})
        rng = random.Random(f"{row['subject']}-{relation.name}")
        target = row.get(edit) or (rng.choice(others) if others else "")
        if not target:
            raise FactsError(f"{path.name}, row {line}, column {edit}: relation {relation.name!r} has no other answer to draw an edit answer from; fill the column")
        if target == true:
            raise FactsError(f"{path.name}, row {line}, column {edit}: the edit answer equals the true answer {true!r}")
        wrong = [d.strip() for d in row.get("distractors", "").split("|") if d.strip()]
        if true in wrong or len(set(wrong)) < len(wrong):
            raise FactsError(f"{path.name}, row {line}, column distractors: {'|'.join(wrong)!r} repeats an option or contains the true answer")
        wrong = [target, *(d for d in wrong if d != target)][: N_DISTRACTORS if wrong else 1]
        spare = [o for o in others if o not in wrong]
        wrong += rng.sample(spare, min(len(spare), N_DISTRACTORS - len(wrong)))
        phrases = tuple(p.strip() for p in row.get("paraphrases", "").split("|") if p.strip())
        for phrase in phrases:
            if phrase.count("{subject}") != 1:
                raise FactsError(f"{path.name}, row {line}, column paraphrases: {phrase!r} must contain {{subject}} once")
        yield Fact(row["subject"], relation, true, target, tuple(wrong), phrases)
