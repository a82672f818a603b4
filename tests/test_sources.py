"""Facts and texts from elsewhere, read from local files of the same columns with the hub offline."""

import datasets
import pytest
import small
from source_cases import athletes_file, full_rows, go_offline, paper_folder, tracing_rows, written

from helpers import facts, metrics, sources
from helpers.datafiles import SourceError
from helpers.facts import split
from helpers.sources import load, texts


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    go_offline(tmp_path, monkeypatch)


# Athletes -------------------------------------------------------------------------------------------


def test_athletes_with_the_papers_edit_answers(tmp_path):
    file = athletes_file(tmp_path)
    ann, bo = facts.load(f"paper-athletes:{file}")
    assert (ann.subject, ann.answer, ann.edit, ann.distractors) == ("Ann Lee", "baseball", "football", ("football", "basketball", "golf"))
    assert bo.edit == "basketball" and ann.relation.examples == (("Tiger Woods", "golf"),)
    assert [fact.edit for fact in facts.load(f"paper-athletes:{file}", edit="edit_answer_golf")] == ["golf", "baseball"]
    with pytest.raises(SourceError, match="edit='tennis'; there are edit_answer, edit_answer_golf"):
        load("paper-athletes", str(file), "tennis")


# CounterFact ----------------------------------------------------------------------------------------


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
