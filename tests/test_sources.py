"""Facts and texts from elsewhere, read from local files of the same columns with the hub offline; counts of the paper on the real files."""

import csv
import hashlib
import json
from pathlib import Path

import datasets
import pytest
import small
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants

from helpers import datafiles, facts, metrics, sources
from helpers.facts import FactsError, split
from helpers.datafiles import SourceError
from helpers.sources import load, texts

CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No network, and a cache of the test's own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def athletes_file(folder: Path) -> Path:
    columns = ("athlete", "sport", "prompt", "inject_sport_with_golf", "inject_sport_without_golf")
    rows = [("Ann Lee", "baseball", "Fact: Tiger\nFact: Ann", "golf", "football"), ("Bo Ray", "football", "x", "baseball", "basketball")]
    with (folder / "sports.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return folder / "sports.csv"


def tracing_rows(n: int = 12) -> list[dict]:
    """Facts of two relations in two wordings, with spaces before subjects and targets, as on the hub."""
    rows = []
    for i in range(n):
        subject, start = f"Thing {i}", ("", "The home of")[i % 2]
        prompt = f"{start} {subject}{(' lies in', ' is')[i % 2]}".strip()
        true, false = (f" {CITIES[(i + k) % 5]}" for k in (0, 2))
        rows.append({"relation_id": f"P{i % 3 % 2}", "prompt": prompt, "subject": f" {subject}" if start else subject, "target_true": true,
                     "target_false": false})
    return rows


def full_rows() -> list[dict]:
    """As in the full data set: nested, and with paraphrases that begin with another sentence."""
    rows = []
    for row in tracing_rows():
        subject = row["subject"].strip()
        asked = {"prompt": row["prompt"].replace(subject, "{}"), "subject": subject, "relation_id": row["relation_id"],
                 "target_true": {"id": "Q1", "str": row["target_true"].strip()},
                 "target_new": {"id": "Q2", "str": row["target_false"].strip()}}
        phrases = [f"He saw {subject}. {subject} is found in", "Nobody knows. It is in"]
        rows.append({"requested_rewrite": asked, "paraphrase_prompts": phrases})
    return rows


def paper_folder(folder: Path, n: int = 150, model: str = "gemma_7b") -> Path:
    """The authors' data set as the hub lays one out: a parquet file a split. Every third fact is unknown to the model."""
    rows = [{**row, "prompt_id": i, "prob_of_correct_answer": (0.9, 0.5, 0.49)[i % 3], "paraphrase_prompts": [row["prompt"]] * 2}
            for i, row in enumerate(tracing_rows(n))]
    for row in rows:
        del row["relation_id"]
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "data" / f"{model}-00000-of-00001.parquet")
    return folder


# Athletes -------------------------------------------------------------------------------------------


def test_athletes_with_the_papers_edit_answers(tmp_path):
    file = athletes_file(tmp_path)
    ann, bo = facts.load(f"paper-athletes:{file}")
    assert (ann.subject, ann.answer, ann.edit, ann.distractors) == ("Ann Lee", "baseball", "football", ("football", "basketball", "golf"))
    assert bo.edit == "basketball" and ann.relation.examples == (("Tiger Woods", "golf"),)
    assert [fact.edit for fact in facts.load(f"paper-athletes:{file}", edit="edit_answer_golf")] == ["golf", "baseball"]
    with pytest.raises(SourceError, match="edit='tennis'; there are edit_answer, edit_answer_golf"):
        load("paper-athletes", str(file), "tennis")


def test_the_download_is_checked_and_kept(tmp_path, monkeypatch):
    content, asked = athletes_file(tmp_path).read_bytes(), []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datafiles.urllib.request, "urlopen", lambda url, timeout: asked.append(url) or (tmp_path / "sports.csv").open("rb"))
    with pytest.raises(SourceError, match="is not the file that the paper used"):
        load("paper-athletes")
    monkeypatch.setattr(sources, "ATHLETES_MD5", hashlib.md5(content).hexdigest())
    first = load("paper-athletes")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("paper-athletes") == first and asked == [sources.ATHLETES] * 2


def test_nothing_to_download_from(monkeypatch):
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE is set: unset it, or give a copy"):
        load("paper-athletes")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def refuse(url, timeout):
        raise datafiles.urllib.request.HTTPError(url, 404, "Not Found", {}, None)

    monkeypatch.setattr(datafiles.urllib.request, "urlopen", refuse)
    with pytest.raises(SourceError, match="cannot be had .*404.*: give a copy"):
        load("paper-athletes")


# CounterFact ----------------------------------------------------------------------------------------


def written(folder: Path, rows: list[dict], suffix: str) -> str:
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_prompts_become_templates(tmp_path, suffix):
    rows = tracing_rows()
    found = facts.load(f"counterfact-tracing:{written(tmp_path, rows, suffix)}")
    assert len(found) == len(rows)
    for fact, row in zip(found, rows):
        assert fact.relation.cloze.replace("{subject}", fact.subject) == row["prompt"]
        assert (f" {fact.answer}", f" {fact.edit}") == (row["target_true"], row["target_false"])
        assert fact.relation.name == row["relation_id"] and fact.distractors[0] == fact.edit and fact.answer not in fact.distractors
        of_relation = {r["target_true"].strip() for r in rows if r["relation_id"] == row["relation_id"]}
        assert len(set(fact.distractors)) == 3 and set(fact.distractors[1:]) <= of_relation
    assert found == facts.load(f"counterfact-tracing:{tmp_path / f'rows{suffix}'}")


def test_the_full_set_brings_paraphrases(tmp_path):
    found = facts.load(f"counterfact:{written(tmp_path, full_rows(), '.parquet')}")
    plain = facts.load(f"counterfact-tracing:{written(tmp_path, tracing_rows(), '.jsonl')}")
    assert [(f.subject, f.answer, f.edit, f.distractors) for f in found] == [(f.subject, f.answer, f.edit, f.distractors) for f in plain]
    assert [f.relation.cloze for f in found] == [f.relation.cloze for f in plain]
    # the last mention of the subject is the one asked about; a paraphrase without any is left out
    assert found[3].paraphrases == ("He saw Thing 3. {subject} is found in",)


def test_a_fact_that_comes_again_has_a_key_of_its_own(tmp_path):
    rows = tracing_rows()
    found = facts.load(f"counterfact-tracing:{written(tmp_path, [*rows, rows[0]], '.jsonl')}")
    assert len({fact.key for fact in found}) == 13 and found[12].relation.name == "P0 (2)"
    assert found[12].distractors == found[0].distractors


def test_the_papers_filter_and_order(tmp_path):
    """Known with probability .5 or more, in order, without the last 64."""
    folder, rows = paper_folder(tmp_path / "authors"), tracing_rows(150)
    found = facts.load(f"paper-counterfact-gemma-7b:{folder}")
    known = [row for i, row in enumerate(rows) if i % 3 < 2]
    assert [fact.subject for fact in found] == [row["subject"].strip() for row in known[:-64]]
    assert found[0].relation.name == "{subject} lies in"  # without relation ids the templates are the relations
    parts = split(found, "first-16")
    assert (len(parts.forget), len(parts.retain_train), len(parts.retain_test)) == (16, 16, 4)
    with pytest.raises(SourceError, match="paper-counterfact-llama-3-8b: cannot be read .*llama3_8b"):
        facts.load(f"paper-counterfact-llama-3-8b:{folder}")


def test_questions_are_joined_where_they_are_supplied(tmp_path):
    folder = paper_folder(tmp_path / "authors")
    wrong = ["Rome", "Bergen", "Quito"]
    asked = [{"prompt_id": i, "question": text, "targets_false": wrong} for i, text in enumerate(("Where is Thing 0?", "Where is it?"))]
    datasets.Dataset.from_list(asked).to_parquet(folder / "counterfact_mc_questions.parquet")
    first, second, third = facts.load(f"paper-counterfact-gemma-7b:{folder}")[:3]
    assert first.relation.question == "Where is {subject}?" and first.distractors == ("Oslo", "Rome", "Bergen")
    assert second.distractors == ("Lima", "Bergen", "Quito")  # the true answer is no distractor, whatever the file says
    assert second.relation.question.startswith("Which answer completes this")  # the subject is not in the question
    assert third.relation.question.startswith("Which answer completes this")


def test_a_changed_data_set_is_noticed(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="no column relation_id, target_true; found prompt, subject, target_false"):
        load("counterfact-tracing", written(tmp_path, [{"prompt": "a", "subject": "a", "target_false": "b"}], ".jsonl"))
    broken = full_rows()
    del broken[5]["requested_rewrite"]["target_new"]
    with pytest.raises(SourceError, match="requested_rewrite: no column target_new"):
        load("counterfact", written(tmp_path, broken, ".jsonl"))
    folder = paper_folder(tmp_path / "authors")
    stored = datasets.load_dataset(str(folder), split="gemma_7b")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stored)
    with pytest.raises(SourceError, match="the filter keeps 100 facts, and 2189 in the paper"):
        load("paper-counterfact-gemma-7b")


@pytest.mark.parametrize(
    "error, message",
    [
        (ConnectionError("Couldn't reach the Hub"), "not in the local cache, and the hub cannot be reached.*give a copy: counterfact:<p"),
        (DatasetNotFoundError("Dataset 'azhx/counterfact' is a gated dataset on the Hub."), "is gated: accept its terms.*set HF_TOKEN"),
        (DatasetNotFoundError("Dataset 'azhx/counterfact' doesn't exist on the Hub"), "no data set azhx/counterfact on the hub, or"),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SourceError, match=message):
        load("counterfact")


def test_the_hub_offline():
    """No stand-in: what `datasets` itself says while offline is understood."""
    with pytest.raises(SourceError, match="counterfact-tracing: NeelNanda/counterfact-tracing is not in the local cache"):
        facts.load("counterfact-tracing")


def test_revisions_are_pinned_and_all_parts_read(monkeypatch):
    """The full data set is cut into two parts on the hub, 19,728 + 2,191 facts."""
    asked, stored = [], {"azhx/counterfact": full_rows(), "NeelNanda/counterfact-tracing": tracing_rows()}

    def give(repo, revision, split, streaming):
        asked.append((repo, revision, split))
        return datasets.Dataset.from_list(stored[repo])

    monkeypatch.setattr(datasets, "load_dataset", give)
    load("counterfact"), load("counterfact-tracing")
    assert asked == [("azhx/counterfact", "c01c413f856ee38f5c080c9fc5e87aff478e2ff9", "train+test"),
                     ("NeelNanda/counterfact-tracing", "c945b082ca08d0a8f3ba227fb78404a09614c36e", "train")]


ATHLETE = {"athlete": "Ann Lee", "sport": "baseball", "inject_sport_with_golf": "golf", "inject_sport_without_golf": "football"}


@pytest.mark.parametrize("rows, said", [
    ([], "paper-athletes: no rows"),
    ([ATHLETE, {**ATHLETE, "athlete": "Bo Ray", "sport": "chess"}], "row 2: Bo Ray, chess, to be edited to football.*baseball"),
    ([{**ATHLETE, "inject_sport_without_golf": "baseball"}], "row 1: Ann Lee, baseball, to be edited to baseball"),
    ([ATHLETE, ATHLETE], "row 2: Ann Lee.*Every athlete comes once"),
    ([{**ATHLETE, "sport": None}], "row 1: sport is None, and has to be text"),
])
def test_athletes_that_cannot_be_used(tmp_path, rows, said):
    with pytest.raises(SourceError, match=said):
        load("paper-athletes", written(tmp_path, rows, ".json"))


@pytest.mark.parametrize("change, said", [
    ({"target_true": None}, "counterfact-tracing, row 3: target_true is None"), ({"subject": " "}, "row 3: subject is ' '"),
    ({"prompt": "It lies in"}, "row 3: the prompt 'It lies in' does not mention its subject, Thing 2")])
def test_rows_that_cannot_be_used(tmp_path, change, said):
    rows = tracing_rows()
    rows[2] |= change
    with pytest.raises(SourceError, match=said):
        load("counterfact-tracing", written(tmp_path, rows, ".jsonl"))


def test_probabilities_have_to_be_numbers(tmp_path):
    row = {**tracing_rows(1)[0], "prompt_id": 0, "paraphrase_prompts": []}
    rows = [{**row, "prob_of_correct_answer": chance} for chance in (0.9, "likely")]
    with pytest.raises(SourceError, match="prob_of_correct_answer is to be a number in every row .*likely"):
        load("paper-counterfact-gemma-7b", written(tmp_path, rows, ".json"))


def test_names_and_paths(tmp_path):
    with pytest.raises(FactsError, match="no facts at 'counterfacts': give one of athletes, world, paper-athletes, counterfact"):
        facts.load("counterfacts")
    with pytest.raises(SourceError, match="no source 'world'"):
        load("world")
    with pytest.raises(SourceError, match="counterfact: nothing at /nowhere"):
        facts.load("counterfact:/nowhere")
    with pytest.raises(SourceError, match="one edit answer a fact, so edit='edit_answer_golf'"):
        facts.load("counterfact", edit="edit_answer_golf")
    (tmp_path / "rows.xml").touch()
    with pytest.raises(SourceError, match="is neither a folder nor one of .parquet, .json"):
        load("counterfact", str(tmp_path / "rows.xml"))
    (tmp_path / "rows.json").write_text("[{]")
    with pytest.raises(SourceError, match="rows.json cannot be read"):
        load("counterfact", str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text('{"data": []}')
    with pytest.raises(SourceError, match="a list of objects is expected, not dict"):
        load("counterfact", str(tmp_path / "rows.json"))


# Texts ----------------------------------------------------------------------------------------------


def test_texts_from_files(tmp_path):
    own = [f"text number {i}" for i in range(9)]
    (tmp_path / "own.txt").write_text("\n\n".join(own))
    found = texts(str(tmp_path / "own.txt"), 5, seed=1)
    assert len(set(found)) == 5 and set(found) <= set(own)
    assert found == texts(written(tmp_path, [{"text": text} for text in own], ".parquet"), 5, seed=1)
    assert found != texts(str(tmp_path / "own.txt"), 5, seed=2)
    with pytest.raises(SourceError, match="9 texts, 10 are needed"):
        texts(str(tmp_path / "own.txt"), 10)
    with pytest.raises(SourceError, match="no texts at 'nowhere': give 'pile'"):
        texts("nowhere")
    with pytest.raises(SourceError, match="rows.jsonl, row 2: text is None"):
        texts(written(tmp_path, [{"text": "one"}, {"text": None}], ".jsonl"), 1)
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(SourceError, match="latin.txt: not UTF-8"):
        texts(str(tmp_path / "latin.txt"), 1)
    with pytest.raises(SourceError, match="pile: monology/pile-uncopyrighted is not in the local cache.*or give a file of texts in its place"):
        texts("pile", 6)
    assert texts("", 3) == sources.general_texts(3)


def test_text_to_train_on_and_to_measure_with_is_disjoint(tmp_path):
    own = [f"text number {i}" for i in range(9)]
    (tmp_path / "own.txt").write_text("\n\n".join(own))
    taught, held_out = sources.text_sets(str(tmp_path / "own.txt"), n=6, n_held_out=3)
    assert len(taught) == 6 and set(taught) | set(held_out) == set(own)
    taught, held_out = sources.text_sets()
    assert (taught, held_out) == (sources.general_texts(), sources.general_texts(200, held_out=True)) and not set(taught) & set(held_out)


def test_the_pile_is_streamed_once(tmp_path, monkeypatch):
    rows = [{"text": f"document {i} " + "x" * 5000} for i in range(40)]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "pile.jsonl")
    real, asked = datasets.load_dataset, []

    def stream(repo, revision, split, streaming):
        asked.append((repo, revision, streaming))
        return real("json", data_files=str(tmp_path / "pile.jsonl"), split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", stream)
    found = texts("pile", 6, seed=3, buffer=20)
    assert len(set(found)) == 6 and all(len(text) == sources.TEXT_LENGTH and text.startswith("document") for text in found)
    assert texts("pile", 6, seed=3, buffer=20) == found
    assert asked == [("monology/pile-uncopyrighted", sources.PILE.revision, True)]


# On to prompts and measures -------------------------------------------------------------------------


def worded_rows(n: int) -> list[dict]:
    """Facts in the words of the tiny random models."""
    return [{"relation_id": "P1", "prompt": f"w{20 + i} w10 w11", "subject": f"w{20 + i}", "target_true": f" w{40 + i % 3}",
             "target_false": f" w{43 + i % 2}"} for i in range(n)]


def test_facts_of_a_source_can_be_asked_about(tmp_path):
    """What a source gives goes through prompts and measures like bundled facts."""
    found = facts.load(f"counterfact-tracing:{written(tmp_path, worded_rows(9), '.jsonl')}")
    for format in ("cloze", "one_shot"):
        table = metrics.ask(small.model(), found, format)
        assert table["answer"].tolist() == [fact.answer for fact in found] and table["p_true"].between(0, 1, inclusive="neither").all()


def test_facts_that_cannot_be_asked_are_not_known(tmp_path):
    """Answers that share their first token, and a relation without a case for an example."""
    rows = worded_rows(6)
    rows[2] |= {"target_true": "w44 w6", "target_false": "w44 w5"}
    rows[4]["relation_id"] = "P2"
    found = facts.load(f"counterfact-tracing:{written(tmp_path, rows, '.jsonl')}")
    with pytest.warns(UserWarning, match="2 of 6 facts cannot be asked of llama"):
        known = metrics.known(small.model(), found, threshold=0.0)
    assert [fact.subject for fact in known] == ["w20", "w21", "w23", "w25"]
