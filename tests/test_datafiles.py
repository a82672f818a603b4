"""What a file, a download or the hub may hold that cannot be used: said by name and row, and nothing is lost."""

import hashlib

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants
from source_cases import athletes_file, full_rows, go_offline, paper_folder, tracing_rows, written

from helpers import datafiles, facts, sources
from helpers.datafiles import SourceError
from helpers.facts import FactsError
from helpers.sources import load


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    go_offline(tmp_path, monkeypatch)


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
