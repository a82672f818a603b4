"""Facts and texts from elsewhere: the paper's athletes, CounterFact and the Pile, in the types that everything here takes.

    facts.load("paper-athletes")                      # the authors' file: downloaded once, its content checked
    facts.load("paper-counterfact-gemma-7b")          # CounterFact as the paper filtered and ordered it for a model
    facts.load("counterfact:data/counterfact.jsonl")  # a local copy, of the same columns
    texts("pile", 512)                                # general text for training and evaluation

| name | what | where it comes from |
|---|---|---|
| `paper-athletes` | 1,559 athletes with the paper's edit answers (spec section 1.1) | the authors' repository |
| `paper-counterfact-<model>` | facts that gemma-7b, gemma-2-9b or llama-3-8b knows (section 1.3) | the authors' data set |
| `counterfact` | all of CounterFact, with paraphrases (arXiv 2202.05262) | azhx/counterfact |
| `counterfact-tracing` | the same facts, prompts alone | NeelNanda/counterfact-tracing |

After a colon: a path to read in place of the download. CounterFact's prompts become templates, its relations those of the data set
or, where it names none, the templates themselves. Where no questions are supplied, multiple choice takes its wrong options from other
answers of the relation. What is downloaded stays in the hub's cache, and revisions are pinned. Nothing is bundled: the authors' files
carry no licence.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from helpers import datafiles, provenance
from helpers.datafiles import HubData, SourceError, cell
from helpers.facts import DATA, N_DISTRACTORS, Fact, Facts, load_relations, relation
from helpers.unlearning.texts import general_texts

AUTHORS = "https://github.com/magikarp01/tasks/raw"
ATHLETES = f"{AUTHORS}/73471cbf3351964123fcda79e3f147e1c63b796c/facts/data/sports.csv"
ATHLETES_MD5 = "38a9edb49d1266c2853cb1586c45be0a"
QUESTIONS = f"{AUTHORS}/b139e7b27fdf9b15bc2021d331097451e535ed33/facts/data/counterfact_mc_questions.parquet"
COUNTERFACT = HubData("azhx/counterfact", "c01c413f856ee38f5c080c9fc5e87aff478e2ff9", "train+test")  # cut in two there
TRACING = HubData("NeelNanda/counterfact-tracing", "c945b082ca08d0a8f3ba227fb78404a09614c36e")
PAPER = HubData("PhillipGuo/counterfact-with-gemma-probs", None)
PILE = HubData("monology/pile-uncopyrighted", "3be90335b66f24456a5d6659d9c8d208c0357119", instead="a file of texts in its place")
# split of the authors' data set, and how many facts its filter keeps (for Llama not stated exactly): what tells a changed file
PAPER_MODELS = {"gemma-7b": ("gemma_7b", 2189), "gemma-2-9b": ("gemma2_9b", 2250), "llama-3-8b": ("llama3_8b", None)}
KNOWN, FEW_SHOT = 0.5, 64  # probability from which on a fact counts as known; rows at the end set aside for few-shot examples
EDITS = {"edit_answer": "inject_sport_without_golf", "edit_answer_golf": "inject_sport_with_golf"}
TEXT_LENGTH = 4000  # characters of a text that are kept; training reads the first 100 tokens


def load(name: str, where: str = "", edit: str = "edit_answer") -> Facts:
    """The facts of a source in its table above, in the paper's order. Raises `SourceError`.

    `where`: a file or folder in place of the download. `edit`: for `paper-athletes` also `edit_answer_golf`, another of the four sports in
    place of another of the three. (For whole-sport editing: `.edited_to("golf")`.)
    """
    if name not in NAMES:
        raise SourceError(f"no source {name!r}; there are {', '.join(NAMES)}")
    if name != "paper-athletes" and edit != "edit_answer":
        raise SourceError(f"{name}: it has one edit answer a fact, so edit={edit!r} cannot be chosen")
    if where and not provenance.given_path(where).exists():
        raise SourceError(f"{name}: nothing at {where}")
    where = str(provenance.given_path(where)) if where else ""
    return NAMES[name](where, edit) if name == "paper-athletes" else NAMES[name](where)


def texts(source: str = "", n: int = 512, seed: int = 0, buffer: int = 50_000) -> list[str]:
    """n general texts.

    `source`: empty for the tiny models' own kind; `pile` for a stream of the Pile, shuffled in a buffer as in the paper (section 1.4;
    the first call reads `buffer` documents) and kept in the cache; or a file: .txt with blank lines between texts, or .parquet, .json,
    .jsonl or .csv with a column `text`. Raises `SourceError`, also for fewer than n texts.
    """
    if not source:
        return general_texts(n, seed)
    if source == "pile":
        return _pile(n, seed, buffer)
    path = provenance.given_path(source)
    if path.suffix == ".txt" and path.is_file():
        found = [text.strip() for text in datafiles.decoded(path).split("\n\n") if text.strip()]
    elif path.exists():
        found = [cell(source, number, row, "text") for number, row in enumerate(datafiles.rows(source, None, "train", str(path), ("text",)), 1)]
    else:
        raise SourceError(f"no texts at {source!r}: give 'pile', a .txt file, or one of {', '.join(datafiles.READERS)}")
    if len(found) < n:
        raise SourceError(f"{source}: {len(found)} texts, {n} are needed")
    return [text[:TEXT_LENGTH] for text in random.Random(f"texts-{seed}").sample(found, n)]


def text_sets(source: str = "", seed: int = 0, n: int = 512, n_held_out: int = 200) -> tuple[list[str], list[str]]:
    """Text to train on and other text to measure with. Of the tiny models' own kind, the latter is in no tiny model's training either.

    `source` and errors as in `texts`.
    """
    if not source:
        return general_texts(n), general_texts(n_held_out, held_out=True)
    drawn = texts(source, n + n_held_out, seed)
    return drawn[:n], drawn[n:]


def _athletes(where: str, edit: str) -> Facts:
    if edit not in EDITS:
        raise SourceError(f"paper-athletes: edit={edit!r}; there are {', '.join(EDITS)}")
    path = Path(where) if where else datafiles.download(ATHLETES, ATHLETES_MD5)
    needed = ("athlete", "sport", *EDITS.values())
    sport = replace(load_relations(DATA / "relations.yaml")["sport"], examples=(("Tiger Woods", "golf"),))
    made = {}
    for number, row in enumerate(datafiles.rows("paper-athletes", None, "train", str(path), needed), 1):
        name, true, false = (cell("paper-athletes", number, row, column) for column in ("athlete", "sport", EDITS[edit]))
        if name in made or true == false or not {true, false} <= set(sport.options):
            raise SourceError(f"paper-athletes, row {number}: {name}, {true}, to be edited to {false}. Every athlete comes once, with two "
                              f"different sports of {', '.join(sport.options)}")
        others = [option for option in sport.options if option not in (true, false)]
        made[name] = Fact(name, sport, true, false, (false, *others))
    return Facts(tuple(made.values()), "paper-athletes")


def _counterfact(where: str) -> Facts:
    rows = []
    for row in datafiles.rows("counterfact", COUNTERFACT, COUNTERFACT.split, where, ("requested_rewrite", "paraphrase_prompts")):
        asked = row["requested_rewrite"]
        datafiles.columns("counterfact, requested_rewrite", asked, ("prompt", "subject", "relation_id", "target_true", "target_new"))
        rows.append({**asked, "prompt": asked["prompt"].replace("{}", asked["subject"], 1), "paraphrases": row["paraphrase_prompts"],
                     "target_true": asked["target_true"]["str"], "target_false": asked["target_new"]["str"]})
    return _facts("counterfact", rows)


def _tracing(where: str) -> Facts:
    needed = ("prompt", "subject", "relation_id", "target_true", "target_false")
    return _facts("counterfact-tracing", datafiles.rows("counterfact-tracing", TRACING, TRACING.split, where, needed))


def _paper_counterfact(model: str, where: str) -> Facts:
    """What the model knows, but for the last rows; with the authors' multiple-choice questions, which a local folder may have too."""
    name, (split, n_known) = f"paper-counterfact-{model}", PAPER_MODELS[model]
    needed = ("prompt", "prompt_id", "subject", "target_true", "target_false", "prob_of_correct_answer", "paraphrase_prompts")
    every = [{**row, "paraphrases": row["paraphrase_prompts"]} for row in datafiles.rows(name, PAPER, split, where, needed)]
    try:
        known = [row for row in every if float(row["prob_of_correct_answer"]) >= KNOWN]
    except (TypeError, ValueError) as error:
        raise SourceError(f"{name}: prob_of_correct_answer is to be a number in every row ({error})") from error
    if not where and n_known not in (None, len(known)):
        raise SourceError(f"{name}: the filter keeps {len(known)} facts, and {n_known} in the paper: {PAPER.repo} has changed. Give a copy "
                          f"of what you want to use: {name}:<path>")
    beside = Path(where) / Path(QUESTIONS).name
    file = (beside if beside.is_file() else None) if where else datafiles.download(QUESTIONS)
    return _facts(name, known[:-FEW_SHOT], every, {} if file is None else _questions(file))


NAMES = {"paper-athletes": _athletes, "counterfact": _counterfact, "counterfact-tracing": _tracing,
         **{f"paper-counterfact-{model}": partial(_paper_counterfact, model) for model in PAPER_MODELS}}


def _facts(name: str, rows: Sequence[dict], every: Sequence[dict] | None = None, questions: dict | None = None) -> Facts:
    """Facts from rows with prompt, subject, targets and, where there are any, relation_id, paraphrases and questions by prompt_id.

    Wrong options are drawn from the answers of all rows (`every`) of the relation.
    """
    answers, seen, made = defaultdict(set), Counter(), []
    for number, row in enumerate(rows if every is None else every, 1):
        cell(name, number, row, "prompt"), cell(name, number, row, "subject")
        answers[_relation_name(row)].add(cell(name, number, row, "target_true"))
    for number, row in enumerate(rows, 1):
        subject, true, false = (cell(name, number, row, column) for column in ("subject", "target_true", "target_false"))
        named, template = _relation_name(row), _template(row["prompt"], row["subject"])
        if not template:
            raise SourceError(f"{name}, row {number}: the prompt {row['prompt']!r} does not mention its subject, {subject}")
        paraphrases = tuple(filter(None, (_template(text, subject) for text in row.get("paraphrases", ()))))
        question, wrong = (questions or {}).get(row.get("prompt_id"), ("", ()))
        spare = [other for other in wrong if other not in (true, false)]
        if not spare:
            others = sorted(answers[named] - {true, false})
            spare = random.Random(f"{subject}-{named}").sample(others, min(len(others), N_DISTRACTORS - 1))
        seen[subject, named] += 1
        # a fact that comes again, in other words, belongs to a relation of its own
        suffix = f" ({seen[subject, named]})" if seen[subject, named] > 1 else ""
        own = relation(name, f"{named}{suffix}", {"cloze": template, "question": _template(question, subject)})
        made.append(Fact(subject, own, true, false, (false, *spare)[:N_DISTRACTORS], paraphrases))
    if not made:
        raise SourceError(f"{name}: no facts are left")
    return Facts(tuple(made), name)


def _relation_name(row: dict) -> str:
    return row.get("relation_id") or _template(row["prompt"], row["subject"])


def _template(text: str, subject: str) -> str:
    """The text with {subject} in place of the subject's last mention; empty where it is not mentioned, or more would be left of it."""
    before, found, after = text.strip().rpartition(subject.strip())
    return f"{before}{{subject}}{after}" if found else ""


def _questions(file: Path) -> dict:
    """prompt_id -> (question, wrong options) of the authors' multiple-choice questions."""
    rows = datafiles.rows(file.name, None, "train", str(file), ("prompt_id", "question", "targets_false"))
    return {row["prompt_id"]: (row["question"], tuple(wrong.strip() for wrong in row["targets_false"])) for row in rows}


def _pile(n: int, seed: int, buffer: int) -> list[str]:
    kept = datafiles.cache() / f"pile-{PILE.revision[:12]}-{n}-{seed}-{buffer}.json"
    if not kept.is_file():
        stream = datafiles.dataset("pile", PILE, PILE.split, streaming=True).shuffle(seed=seed, buffer_size=buffer)
        with datafiles.explained("pile", PILE):
            found = [row["text"][:TEXT_LENGTH] for row in islice(stream, n)]
        provenance.write_json(kept, found)
    return json.loads(kept.read_text(encoding="utf-8"))
