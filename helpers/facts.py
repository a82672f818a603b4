"""Facts and the relations they belong to. Splits into forget and retain sets are in `helpers.splits`.

A fact is a (subject, relation) pair with one true answer and one *edit answer*, fixed in the data
so that every method edits to the same false answer. Facts come from a CSV file with the columns
``subject, relation, answer`` (optional: ``edit_answer``, ``distractors``, ``paraphrases``, where
several values are joined by ``|``, and ``role``: rows marked ``example`` are the solved cases of
one-shot prompts, not facts to edit) and relation templates from a YAML file. What is missing is
derived from the other facts of the relation, or refused with a message naming row and column.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from helpers import provenance

DATA = Path(__file__).resolve().parent.parent / "data"
BUNDLED = {"athletes": DATA / "athletes.csv", "world": DATA / "world.csv"}
REQUIRED = ("subject", "relation", "answer")
N_DISTRACTORS = 3
ROLES = ("", "example")
RELATION_FIELDS = ("cloze", "paraphrases", "question", "noun", "options", "attributes")


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
    """An ordered set of facts, keyed by (subject, relation). A slice, list or mask as index gives Facts."""

    items: tuple[Fact, ...]
    name: str = "facts"

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self.items)

    def __getitem__(self, index):
        if isinstance(index, slice) or hasattr(index, "__iter__"):
            return Facts(tuple(self.items[i] for i in row_numbers(index, len(self))), self.name)
        return self.items[index]

    def where(self, keep) -> "Facts":
        """The facts for which ``keep(fact)`` is true, in order."""
        return Facts(tuple(f for f in self.items if keep(f)), self.name)

    def counts(self) -> Counter:
        """Number of facts per answer."""
        return Counter(f.answer for f in self.items)

    def edited_to(self, answer: str) -> "Facts":
        """The same facts with one edit answer for all, as in editing a whole sport. Raises FactsError where it is the true one."""
        for f in self.items:
            if f.answer == answer:
                raise FactsError(f"{f.subject!r} ({f.relation.name}): the edit answer {answer!r} is the true answer")
        others = lambda f: tuple(d for d in f.distractors if d != answer)[: N_DISTRACTORS - 1]
        return Facts(tuple(replace(f, edit=answer, distractors=(answer, *others(f))) for f in self.items), self.name)

    def answers(self, relation: str) -> tuple[str, ...]:
        """The distinct true answers of one relation, sorted."""
        return tuple(sorted({f.answer for f in self.items if f.relation.name == relation}))

    def digest(self) -> str:
        """Content hash of the facts (not of the file): equal facts in equal order, equal digest."""
        return hashlib.sha256(repr(self.items).encode()).hexdigest()[:16]


def row_numbers(index, n: int) -> list[int]:
    """The rows out of n that a slice, a sequence of row numbers or a mask (one boolean a row) selects."""
    if isinstance(index, slice):
        return list(range(n)[index])
    chosen = index.tolist() if hasattr(index, "tolist") else list(index)
    if any(isinstance(i, bool) for i in chosen):
        if len(chosen) != n:
            raise IndexError(f"a mask of {len(chosen)} rows does not fit {n} rows")
        return [i for i, keep in enumerate(chosen) if keep]
    return [int(i) for i in chosen]


def load(source: str | Path = "athletes", relations: str | Path | None = None, edit: str = "edit_answer") -> Facts:
    """Load a bundled set of facts (``athletes``, ``world``), one from elsewhere (see `helpers.sources`) or a CSV file.

    ``relations``: YAML file with the templates; by default ``<file>.yaml`` beside the CSV if there
    is one, else the bundled ``data/relations.yaml``. ``edit``: the column that holds the edit
    answer (athletes also have ``edit_answer_golf``). Raises FactsError.
    """
    from helpers import sources  # which imports this module

    name, _, where = str(source).partition(":")
    if name in sources.NAMES:
        return sources.load(name, where, edit)
    path = BUNDLED.get(str(source)) or provenance.given_path(source)
    if not path.is_file():
        raise FactsError(f"no facts at {str(source)!r}: give one of {', '.join((*BUNDLED, *sources.NAMES))} or the path of a CSV file "
                         f"with the columns {', '.join(REQUIRED)}")
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
            raise FactsError(f"{path.name}, row {line}, column relation: unknown relation {row['relation']!r}; "
                             f"{Path(relations).name} has {', '.join(sorted(templates))}")
        if row.get("role") == "example":
            examples[row["relation"]] += ((row["subject"], row["answer"]),)
    templates = {name: replace(r, examples=examples[name]) for name, r in templates.items()}
    asked = [(line, row) for line, row in rows if row.get("role") != "example"]
    if not asked:
        raise FactsError(f"{path.name}: no facts, only examples")
    return Facts(tuple(_complete(path, asked, templates, edit)), path.stem)


def load_relations(path: str | Path) -> dict[str, Relation]:
    """Relations by name from a YAML file. Raises FactsError naming relation and field."""
    path = Path(path)
    if not path.is_file():
        raise FactsError(f"no relation templates at {path}")
    try:
        raw = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise FactsError(f"{path.name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise FactsError(f"{path.name}: expected a mapping of relation name to templates")
    return {name: relation(path.name, name, spec) for name, spec in raw.items()}


def __getattr__(name: str):
    # Splits are part of this module's interface, but helpers.splits imports it: look them up on demand.
    if name in ("Split", "split", "halves", "neighbors"):
        from helpers import splits

        return getattr(splits, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def relation(file: str, name: str, spec: dict) -> Relation:
    """A relation from fields of a relations file; `file` is for messages. Raises FactsError."""
    where = f"{file}: relation {name!r}"
    if not isinstance(spec, dict) or not spec.get("cloze"):
        raise FactsError(f"{where} needs at least a 'cloze' template")
    unknown = sorted(set(map(str, spec)) - set(RELATION_FIELDS))
    if unknown:
        raise FactsError(f"{where} has unknown fields {unknown}; fields are {', '.join(RELATION_FIELDS)}")
    paraphrases, options = (_words(where, field, spec.get(field) or []) for field in ("paraphrases", "options"))
    attributes = []
    for key, value in (spec.get("attributes") or {}).items():
        if not isinstance(value, dict) or set(value) != {"cloze", "answers"} or not isinstance(value["answers"], dict):
            raise FactsError(f"{where}: attribute {key!r} needs 'cloze' and 'answers', a mapping of answer to value")
        pairs = zip(_words(where, key, [*value["answers"]]), _words(where, key, [*value["answers"].values()]))
        attributes.append(Attribute(key, value["cloze"], tuple(pairs)))
    noun = spec.get("noun") or "answer"
    # Without a question the cloze itself is asked: any relation can be put as question and answer.
    question = spec.get("question") or f"Which {noun} completes this: {spec['cloze']} ...?"
    templates = (spec["cloze"], *paraphrases, question, *(a.cloze for a in attributes))
    for template in _words(where, "templates", [*templates]):
        if template.count("{subject}") != 1 or template != template.strip():
            raise FactsError(f"{where}: template {template!r} must contain {{subject}} once, with no space around it all")
    return Relation(name, spec["cloze"], paraphrases, question, noun, options=options, attributes=tuple(attributes))


def _words(where: str, field: str, values: list) -> tuple[str, ...]:
    """A list of strings from YAML, which reads an unquoted ``no`` or ``1`` as something else."""
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise FactsError(f"{where}, {field}: expected a list of texts (put quotes around words such as yes, no, 1), got {values!r}")
    return tuple(values)


def _text(path: Path) -> str:
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise FactsError(f"{path.name}, row {line}: not UTF-8 (byte {data[error.start]:#x}); save the file as UTF-8") from None


def _read_rows(path: Path) -> list[tuple[int, dict]]:
    """(line in the file, row) pairs, validated for columns, blanks and duplicate keys."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        return _checked(path, reader)
    except csv.Error as error:
        raise FactsError(f"{path.name}, row {reader.line_num + 1}: {error} (is a quote left open?)") from None


def _checked(path: Path, reader: csv.DictReader) -> list[tuple[int, dict]]:
    columns = reader.fieldnames = [(c or "").strip() for c in reader.fieldnames or ()]
    missing = [c for c in REQUIRED if c not in columns]
    if missing:
        raise FactsError(f"{path.name}: missing column(s) {', '.join(missing)}; found {', '.join(columns) or 'none'}")
    if len(set(columns)) < len(columns):
        raise FactsError(f"{path.name}: a column stands twice among {', '.join(columns)}")
    rows, seen = [], {}
    for row in reader:
        where = f"{path.name}, row {reader.line_num}"
        if None in row:
            raise FactsError(f"{where}: more values than columns; put quotes around a value that contains a comma")
        row = {k: " ".join((v or "").split()) for k, v in row.items()}
        for column in REQUIRED:
            if not row[column]:
                raise FactsError(f"{where}, column {column}: empty")
        if row.get("role", "") not in ROLES:
            raise FactsError(f"{where}, column role: {row['role']!r}; leave it empty, or write 'example'")
        key = row["subject"], row["relation"]
        if key in seen:
            raise FactsError(f"{where}: ({key[0]}, {key[1]}) stands in row {seen[key]} already")
        seen[key] = reader.line_num
        rows.append((reader.line_num, row))
    if not rows:
        raise FactsError(f"{path.name}: no facts")
    return rows


def _complete(path: Path, rows: list[tuple[int, dict]], templates: dict[str, Relation], edit: str) -> Iterator[Fact]:
    """Facts from rows; missing edit answers and distractors are drawn from the relation's other answers."""
    answers = defaultdict(Counter)
    for _, row in rows:
        answers[row["relation"]][row["answer"]] += 1
    for line, row in rows:
        where, relation, true = f"{path.name}, row {line}", templates[row["relation"]], row["answer"]
        others = sorted((set(answers[relation.name]) | set(relation.options)) - {true})
        rng = random.Random(f"{row['subject']}-{relation.name}")
        target = row.get(edit) or (rng.choice(others) if others else "")
        if not target:
            raise FactsError(f"{where}, column {edit}: relation {relation.name!r} has no other answer to draw an edit answer "
                             "from; fill the column")
        if target == true:
            raise FactsError(f"{where}, column {edit}: the edit answer equals the true answer {true!r}")
        wrong = [d.strip() for d in row.get("distractors", "").split("|") if d.strip()]
        if true in wrong or len(set(wrong)) < len(wrong):
            raise FactsError(f"{where}, column distractors: {'|'.join(wrong)!r} repeats an option or contains the true answer")
        wrong = [target, *(d for d in wrong if d != target)][: N_DISTRACTORS if wrong else 1]
        spare = [o for o in others if o not in wrong]
        wrong += rng.sample(spare, min(len(spare), N_DISTRACTORS - len(wrong)))
        phrases = tuple(p.strip() for p in row.get("paraphrases", "").split("|") if p.strip())
        for phrase in phrases:
            if phrase.count("{subject}") != 1:
                raise FactsError(f"{where}, column paraphrases: {phrase!r} must contain {{subject}} once")
        yield Fact(row["subject"], relation, true, target, tuple(wrong), phrases)
