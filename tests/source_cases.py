"""Files with the columns of the authors' athletes and of CounterFact, as they lie on the hub, and no network."""

import csv
import json
from pathlib import Path

import datasets
from huggingface_hub import constants

CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo")


def go_offline(tmp_path: Path, monkeypatch) -> None:
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


def written(folder: Path, rows: list[dict], suffix: str) -> str:
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows))
    return str(path)
