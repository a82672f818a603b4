"""Presets: the published numbers, to the masks and models that they were published for, and clear refusals for all others."""

import ast
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import small
import torch
import yaml
from transformers import AutoModelForCausalLM

from helpers import memory, presets, selection
from helpers.localization import choices
from helpers.masks import SelectionError
from helpers.presets import PresetError, settings, source
from helpers.unlearning.training import Settings

DEFAULTS = Settings(learning_rate=3e-3, forget_weight=0.7, steps=9, checkpoint_every=4)


@pytest.mark.parametrize(
    "model, task, mask_name, rate, weight",
    [  # spec section 4.1, some from each column, and each group's followers
        ("google/gemma-7b", "athletes", "lookup", 1e-5, 5.0),
        ("google/gemma-2-9b", "athletes", "attribution MLPs", 1e-5, 1.0),
        ("meta-llama/Meta-Llama-3-8B", "athletes", "causal tracing", 1e-4, 2.0),
        ("meta-llama/Meta-Llama-3-8B", "athletes", "random", 1e-4, 2.0),
        ("google/gemma-2-9b", "whole-sport", "all MLPs", 1e-5, 5.0),
        ("google/gemma-7b", "counterfact-16", "random MLPs", 5e-6, 0.1),
        ("google/gemma-2-9b", "counterfact-64", "causal tracing MLPs", 2e-5, 0.5),
        ("meta-llama/Meta-Llama-3-8B", "counterfact-sequential", "everything", 1e-5, 0.2),
        ("google/gemma-7b", "unlearn-sport", "lookup", 1e-5, 0.2),
    ],
)
def test_published_rates(model, task, mask_name, rate, weight):
    found = settings("paper", model, task, mask_name, DEFAULTS)
    assert (found.learning_rate, found.forget_weight) == (rate, weight)
    assert (found.batch, found.clip, found.retain_weight, found.text_tokens, found.masters) == (64, 1.0, 1.0, 100, False)
    assert found.steps == (25 if task == "counterfact-sequential" else 50)
    assert found.format == ("cloze" if task.startswith("counterfact") else "one_shot")
    assert found.checkpoint_every == 4  # what the paper does not say stays as it was
    assert source("paper", model, task, mask_name) == "published (arXiv 2410.12949)"


def test_every_choice_of_the_paper_has_a_rate_and_every_rate_is_in_the_searched_range():
    table = presets.published()
    assert set(table["model"]) == set(selection.SHAPES)
    assert table.groupby("model")["task"].nunique().to_dict() == {"gemma-7b": 7, "gemma-2-9b": 5, "llama-3-8b": 5}
    assert set(table["learning_rate"]) <= {2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4}
    assert set(table["forget_weight"]) <= {0.1, 0.2, 0.5, 1.0, 2.0, 5.0}
    named = {name for masks in table["masks"] for name in masks.split(", ")}
    assert named == set(choices.NAMES) - {"windows"}


def test_windows_follow_the_lookup_mlps_and_say_so():
    of = ("paper", "google/gemma-2-9b", "whole-sport")
    assert settings(*of, "MLP 3-7", DEFAULTS) == settings(*of, "lookup", DEFAULTS)
    assert "the paper has no windows" in source(*of, "MLP 3-7")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("papr", "google/gemma-7b", "athletes", "lookup"), "preset 'papr': there are '', 'paper', 'tuned'"),
        (("paper", "google/gemma-2-2b", "athletes", "lookup"), "google/gemma-2-2b: it is known here, but the paper did not train it"),
        (("paper", "tiny-llama3", "athletes", "lookup"), "is not among the presets. There are some for gemma-7b, gemma-2-9b, llama-3-8b"),
        (("paper", "google/gemma-7b", "world first-64", "lookup"), "task 'world first-64'.*tasks are athletes, whole-sport"),
        (("paper", "google/gemma-2-9b", "unlearn-sport", "lookup"), "nothing published for task 'unlearn-sport'"),
        (("paper", "google/gemma-7b", "athletes", "saliency"), "with mask 'saliency'.*masks lookup, attribution MLPs"),
    ],
)
def test_what_was_not_published_is_refused(arguments, message):
    for call in (lambda: settings(*arguments, DEFAULTS), lambda: source(*arguments)):
        with pytest.raises(PresetError, match=message):
            call()


def test_published_masks_take_the_place_of_localizing():
    model = replace(memory.skeleton(presets.config("gemma-2-9b")), name="google/gemma-2-9b")
    found = presets.given("paper", model, "athletes", ["causal tracing", "everything", "random", "windows"])
    assert {name: chosen.units for name, chosen in found.items()} == {
        name: presets.layers(model, "athletes", name).units for name in ("lookup", "causal tracing")}
    assert presets.given("paper", model, "counterfact-sequential", ["lookup"]) == {}  # localized anew in each slice, also by the paper
    assert presets.given("tuned", model, "athletes", ["lookup"]) == presets.given("", model, "athletes", ["lookup"]) == {}


def test_what_a_preset_lacks_is_said_before_anything_is_loaded():
    presets.check("paper", "google/gemma-2-9b", ["athletes", "whole-sport"], ["lookup", "everything", "windows", "MLP 2-4"])
    presets.check("tuned", "no/such-model", ["anything"], ["lookup"])
    with pytest.raises(PresetError, match="nothing published for task 'unlearn-sport'"):
        presets.check("paper", "google/gemma-2-9b", ["athletes", "unlearn-sport"], ["lookup"])
    with pytest.raises(PresetError, match="mask 'ct': what an edit takes is counted for lookup and everything"):
        presets.expected("gemma-2-9b", "ct")


# spec section 4.1: learning rate / weight of lookup, causal tracing and everything, for gemma-7b, gemma-2-9b and llama-3-8b
RATES = {
    "athletes": "1e-5/5 1e-5/.1 2e-6/.2  1e-5/1 5e-5/5 2e-5/5  5e-5/5 1e-4/2 2e-5/2",
    "whole-sport": "2e-5/5 5e-6/1 5e-6/1  5e-5/5 5e-5/5 1e-5/5  5e-5/.2 5e-5/1 1e-5/.1",
    "counterfact-16": "5e-6/.1 5e-6/.2 5e-6/.2  5e-5/2 5e-5/2 5e-6/1  1e-4/1 2e-5/.1 2e-5/2",
    "counterfact-64": "1e-5/2 2e-5/1 2e-6/1  2e-5/.5 2e-5/2 5e-6/1  5e-5/.2 5e-5/2 1e-5/.2",
    "counterfact-sequential": "1e-5/2 2e-5/1 2e-6/1  2e-5/.5 2e-5/2 5e-6/1  5e-5/.2 5e-5/2 1e-5/.2",
    "unlearn-sport": "1e-5/.2 1e-5/.2 1e-5/.2",
    "unlearn-athletes": "1e-5/1 1e-5/1 1e-5/1",
}


@pytest.mark.parametrize("task", RATES)
def test_every_published_rate(task):
    cells = list(product(("gemma-7b", "gemma-2-9b", "llama-3-8b"), ("lookup", "causal tracing", "everything")))
    for (model, mask_name), pair in zip(cells, RATES[task].split(), strict=False):
        found = settings("paper", model, task, mask_name, DEFAULTS)
        assert [found.learning_rate, found.forget_weight] == [float(number) for number in pair.split("/")], (model, mask_name)
    assert len(RATES[task].split()) == 3 * sum(task in tasks for tasks in yaml.safe_load(presets.PUBLISHED.read_text())["published"].values())


METHODS = {"flu": "manual_interp", "ap": "localized_ap", "ap-mlps": "localized_ap_mlps", "ct": "localized_ct", "ct-mlps": "localized_ct_mlps"}


@pytest.mark.parametrize("choice", selection.PUBLISHED)
def test_every_published_layer(choice):
    """Against the table of what the authors' runs trained, where that is at hand."""
    table = Path(__file__).parents[2] / "shared" / "paper" / "selected_components.csv"
    if not table.is_file():
        pytest.skip(f"no {table.name} beside the project")
    model, task, method = choice.split()
    rows = pd.read_csv(table)
    own = rows["experiment"].str.split("_").str[0] == {"gemma-7b": "gemma", "gemma-2-9b": "gemma2", "llama-3-8b": "llama3"}[model]
    own &= (rows["localization"] == METHODS[method]) & (rows["slice_index"] == 0)
    counterfact, _, n = task.partition("-")
    own &= rows["source_dir"].str.endswith("counterfact") == (counterfact == "counterfact")
    own &= rows["experiment"].str.contains(f"forget_{n}" if n else "forget_") & ~rows["experiment"].str.contains("sequential|copy")
    bare = memory.skeleton(presets.config(model))
    chosen = {(kind, layer) for kind, layer in (unit.split() for unit in selection.preset(bare, model, task, method).units)}
    assert own.any()
    for row in rows[own].itertuples():
        layers = {"attn": ast.literal_eval(row.attn_layers_full_qkvo), "mlp": ast.literal_eval(row.mlp_layers_full)}
        assert chosen == {(kind, str(layer)) for kind, found in layers.items() for layer in found}, row.experiment


def test_no_preset_is_the_defaults():
    assert settings("", "anything", "any task", "any mask", DEFAULTS) == DEFAULTS
    assert source("", "anything", "any task", "any mask") == "defaults"


def test_tuned_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "TUNED", tmp_path)
    of, task = ("tuned", "google/gemma-2-2b", "athletes"), tmp_path / "gemma-2-2b" / "athletes"
    task.mkdir(parents=True)
    lookup, window = task / "lookup.yaml", task / "MLP-2-4.yaml"
    assert settings(*of, "lookup", DEFAULTS) == DEFAULTS and presets.file(*of, "lookup") is None
    assert source(*of, "lookup") == "defaults: nothing is tuned for gemma-2-2b, athletes, lookup"
    lookup.write_text(yaml.safe_dump({"learning_rate": 2e-4, "steps": 30}))
    assert settings(*of, "lookup", DEFAULTS) == replace(DEFAULTS, learning_rate=2e-4, steps=30)
    assert source(*of, "lookup") == "tuned here" and presets.file(*of, "lookup") == lookup
    lookup.write_text(yaml.safe_dump({"learning_rate": 2e-4, "provenance": {"trials": 12}}))
    assert settings(*of, "lookup", DEFAULTS) == replace(DEFAULTS, learning_rate=2e-4)
    assert source(*of, "lookup") == "tuned here: best of 12 trials"
    # a control is trained like what it controls, unless it has settings of its own; which it has not yet
    assert presets.files(*of, "MLP 2-4") == [window, lookup]
    assert settings(*of, "MLP 2-4", DEFAULTS) == replace(DEFAULTS, learning_rate=2e-4) and presets.file(*of, "MLP 2-4") == lookup
    assert source(*of, "MLP 2-4") == "tuned here: best of 12 trials, those of lookup"
    window.write_text(yaml.safe_dump({"learning_rate": 3e-4}))
    assert settings(*of, "MLP 2-4", DEFAULTS) == replace(DEFAULTS, learning_rate=3e-4) and source(*of, "MLP 2-4") == "tuned here"
    assert settings(*of, "everything", DEFAULTS) == DEFAULTS
    for broken, message in (("rate: 1", "has rate; fields are learning_rate"), ("3", "gemma-2-2b/athletes/lookup.yaml holds 3")):
        lookup.write_text(broken)
        with pytest.raises(PresetError, match=message):
            settings(*of, "lookup", DEFAULTS)


@pytest.mark.parametrize(
    "facts, forget, objective, task",
    [
        ("paper-athletes", "first-64", "edit", "athletes"),
        ("athletes", "answer-baseball", "edit", "whole-sport"),
        ("paper-athletes", "answer-basketball", "unlearn", "unlearn-sport"),
        ("paper-counterfact-gemma-7b", "first-16", "edit", "counterfact-16"),
        ("athletes", "first-32", "edit", "athletes first-32"),
        ("world", "first-64", "edit", "world first-64"),
        ("paper-athletes:data/sports.csv", "first-16", "edit", "athletes"),
        ("counterfact:rows.jsonl", "first-64", "edit", "counterfact-64"),
        ("data/my-athletes.csv", "first-64", "edit", "my-athletes first-64"),  # somebody else's: nothing is published for them
    ],
)
def test_tasks(facts, forget, objective, task):
    assert presets.task_of(facts, forget, objective) == task


@pytest.mark.parametrize(
    "given, name",
    [
        ("google/gemma-2-9b", "gemma-2-9b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("/models/Qwen3-4B", "qwen3-4b"),
        ("gemma-7b", "gemma-7b"),
        ("google/gemma-7b-it", None),  # a chat model is not what was published
        ("tiny-gemma2", None),
    ],
)
def test_models_go_by_hub_id_or_folder(given, name):
    assert presets.identify(given) == name


# counted by transformers' own classes from these configurations; the totals are those on the models' pages
SIZES = {"gemma-7b": 8537680896, "gemma-2-9b": 9241705984, "llama-3-8b": 8030261248, "gemma-2-2b": 2614341888, "llama-3.2-1b": 1235814400,
         "llama-3.2-3b": 3212749824, "qwen3-0.6b": 596049920, "qwen3-1.7b": 1720574976, "qwen3-4b": 4022468096, "qwen3-8b": 8190735360,
         "pythia-2.8b": 2775208960}


@pytest.mark.parametrize("name", SIZES)
def test_architectures_have_the_size_of_the_real_models(name):
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(presets.config(name))
    assert sum(parameter.numel() for parameter in hf.parameters()) == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
def test_narrow_models_are_of_the_same_kind(name):
    """As many layers and heads, and the helpers understand them."""
    full, narrow = (memory.skeleton(presets.config(name, width)) for width in (1.0, 0.06))
    for size in ("n_layers", "n_heads", "n_kv_heads", "roles", "tied", "parallel"):
        assert getattr(full, size) == getattr(narrow, size)
    assert narrow.d_model <= full.d_model / 8 and narrow.d_mlp < full.d_mlp / 8
    assert presets.likely_lookup(narrow).layers == presets.likely_lookup(full).layers


def test_the_table_names_every_model_and_marks_what_was_not_published():
    table = presets.models().set_index("model")
    assert set(table.index) == set(SIZES)
    assert table.index[table["published settings"]].tolist() == ["gemma-7b", "gemma-2-9b", "llama-3-8b"]
    assert table.loc["gemma-2-2b", "minutes (authors)"] != table.loc["gemma-2-2b", "minutes (authors)"]  # nothing reported
    costs = [column for column in table if column.startswith(("gib", "minutes"))]
    assert costs and all(column.endswith(("(estimated)", "(authors)")) for column in costs)


@pytest.mark.parametrize("name, mask_name", [("gemma-2-9b", "lookup"), ("qwen3-0.6b", "everything")])
def test_stated_memory_is_what_is_counted(name, mask_name):
    stated = presets.models().set_index("model").loc[name, f"gib, {mask_name} (estimated)"]
    assert presets.expected(name, mask_name).total / memory.GIB == pytest.approx(stated, rel=0.05)


def test_layers_are_those_of_the_paper():
    bare = memory.skeleton(presets.config("gemma-2-9b"))
    named = replace(bare, name="google/gemma-2-9b")
    chosen = presets.layers(named, "whole-sport", "lookup")
    assert (chosen.name, chosen.layers, chosen.n_parameters) == ("lookup", (2, 3, 4, 5, 6), 770703360)
    assert presets.layers(named, "counterfact-64", "attribution MLPs").layers == (30, 32, 33, 34, 35, 37, 38, 41)
    for task, mask_name in (("counterfact-sequential", "lookup"), ("athletes", "everything")):
        with pytest.raises(PresetError, match=f"no published layers for gemma-2-9b, task '{task}'"):
            presets.layers(named, task, mask_name)
    with pytest.raises(SelectionError, match="is no gemma-7b"):
        presets.layers(replace(small.model(), name="google/gemma-7b"), "athletes", "lookup")
    with pytest.raises(PresetError, match="no model 'gemma-3' among the presets; there are gemma-7b"):
        presets.config("gemma-3")


def test_memory_is_announced_before_a_large_model_is_loaded(tmp_path, capsys, monkeypatch):
    assert presets.announce("tiny-gemma2", torch.float32, "auto", ["lookup"]) == [] and capsys.readouterr().out == ""
    presets.config("gemma-2-2b", 0.25).save_pretrained(tmp_path)  # no weights at all: nothing is loaded
    monkeypatch.setattr(presets, "SMALLEST", 2**20)
    asked = ["causal tracing", "everything"]
    read, lookup, everything = presets.announce(str(tmp_path), torch.bfloat16, "split", asked, "", "", Settings(chunk=2))
    said = capsys.readouterr().out
    assert all(title in said for title in (": localization (estimated)", "lookup:", "everything:", "there is room for"))
    assert read.total < lookup.total < everything.total
    bare = memory.skeleton(str(tmp_path), torch.bfloat16)
    assert everything == memory.of_edit(bare, selection.everything(bare), Settings(chunk=2))
    assert len(presets.announce(str(tmp_path), torch.bfloat16, "auto")) == 1  # where nothing is edited
    with pytest.raises(PresetError, match="no published settings"):
        presets.announce(str(tmp_path), torch.bfloat16, "auto", asked, "paper", "athletes")


def test_masks_that_run_with_defaults_beside_tuned_ones_are_named(tmp_path, capsys, monkeypatch):
    """A comparison of tuned with untuned masks is allowed, but said before the model is loaded."""
    monkeypatch.setattr(presets, "TUNED", tmp_path)
    folder = tmp_path / "tiny-gemma2" / "athletes"
    folder.mkdir(parents=True)
    def said(*names, preset="tuned"):
        presets.announce("tiny-gemma2", torch.float32, "auto", names, preset, "athletes")
        return capsys.readouterr().out.splitlines()

    assert said("lookup", "random", "MLP 0-1") == []  # nothing is tuned for any: all are alike
    for name in ("lookup", "all-MLPs"):
        (folder / f"{name}.yaml").write_text("learning_rate: 0.001")
    assert said("lookup", "all MLPs", "windows") == said("lookup", "random", preset="") == said() == []
    assert said("lookup", "random", "all MLPs", "random MLPs") == [
        "nothing is tuned for random, random MLPs: trained with the defaults, unlike lookup, all MLPs"]
    assert said("lookup", "MLP 0-1", "MLP 1-2") == ["nothing is tuned for MLP 0-1, MLP 1-2: trained with the settings of lookup"]
    assert [line.split(":")[0] for line in said("everything", "MLP 0-1")] == ["nothing is tuned for everything", "nothing is tuned for MLP 0-1"]
    found = "learning_rate: 0.001\nprovenance: {trials: 12, learning_rates: [0.0002, 0.05]}"
    for name in ("lookup", "all-MLPs"):
        (folder / f"{name}.yaml").write_text(found)
    assert said("lookup", "all MLPs") == []
    (folder / "everything.yaml").write_text(found.replace("0.05", "0.02"))
    assert said("lookup", "all MLPs", "everything") == ["tuned by searches that differ: lookup, all MLPs by 12 trials at rates "
                                                        "0.0002 to 0.05; everything by 12 trials at rates 0.0002 to 0.02"]
