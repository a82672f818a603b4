"""Training that a kill cannot change, and the card that says what came of it."""

import json
import sys
from dataclasses import asdict, replace

import pytest
import torch
from pretrain_cases import TINY, source

from helpers import facts, model_card, pretrain
from helpers.documents import Corpus
from helpers.models import load_model
from helpers.pretrain import RECIPES, train

# Training -----------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An uninterrupted run: its folder, and the fp32 weights before they were rounded."""
    return run(tmp_path_factory.mktemp("whole") / "tiny")


def run(folder, recipe=TINY, **options):
    """Train, keeping the weights in full precision that `export` rounds."""
    kept, export = {}, pretrain.export
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "CHUNK", 150)

        def keep(model, *args):
            kept.update({n: p.detach().clone() for n, p in model.named_parameters()})
            export(model, *args)
            kept["model"] = model

        patch.setattr(pretrain, "export", keep)
        train(recipe, folder, compiled=False, every=5, **options)
    return folder, kept


def test_a_killed_run_resumes_bit_for_bit(trained, tmp_path):
    """Killed at the worst moment, while the second checkpoint is moved into place: the first one serves.

    It serves no other recipe.
    """
    whole, expected = trained
    steps, replace_file = [], pretrain.os.replace

    def die_on_the_second(source, target):
        if steps:
            raise Killed
        steps.append(target)
        replace_file(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pretrain.os, "replace", die_on_the_second)
        run(tmp_path / "tiny")
    checkpoint = tmp_path / "tiny" / "checkpoint.safetensors"
    assert checkpoint.is_file() and not (tmp_path / "tiny" / "model.safetensors").exists()
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match="belongs to another recipe; delete it"):
        run(tmp_path / "tiny", replace(TINY, learning_rate=1e-3))
    assert checkpoint.read_bytes() == before

    loads, loss_of = [], pretrain.loss_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "loss_of", lambda *args: loads.append(1) or loss_of(*args))
        folder, found = run(tmp_path / "tiny")
    assert len(loads) == TINY.steps - 5  # it did resume
    assert expected.keys() == found.keys() and len(found) > 10
    for name in expected.keys() - {"model"}:
        assert torch.equal(expected[name], found[name]), name
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (folder / "checkpoint.safetensors").exists()
    last = lambda f: (f / "curve.csv").read_text().splitlines()[-1].split(",")[:2]
    assert last(folder) == last(whole) and last(whole)[0] == "12"  # step and tokens


def test_training_learns(tmp_path):
    recipe = replace(TINY, steps=60, learning_rate=5e-3)
    folder, _ = run(tmp_path / "tiny", recipe)
    header, *rows = (folder / "curve.csv").read_text().splitlines()
    assert header == "step,tokens,loss,seconds"
    losses = [float(row.split(",")[2]) for row in rows]
    assert [row.split(",")[0] for row in rows] == ["50", "60"]
    assert losses[1] < losses[0] - 0.3


def test_a_saved_model_is_what_was_trained(trained):
    folder, kept = trained
    model = load_model(str(folder))
    assert model.dtype == torch.float32 and model.n_layers == 2
    ids = model.tokenizer(["Fact: Ray Allen plays the sport of"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = kept["model"].float().eval()(input_ids=ids).logits
        torch.testing.assert_close(model.hf(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.hf.named_parameters():  # weights are those of the last step, rounded once
        assert torch.equal(parameter, kept[name].bfloat16().float()), name
    assert json.loads((folder / "recipe.json").read_text()) == pretrain.asdict(TINY)
    assert model.tokenizer.bos_token_id == ids[0, 0]


def test_an_unknown_model_name_lists_the_valid_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain", "tiny-lama3"])
    with pytest.raises(SystemExit) as stop:
        pretrain.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "tiny-lama3" in message and all(name in message for name in RECIPES)


# Model card ---------------------------------------------------------------------------------------


def test_model_card(trained, monkeypatch):
    """Every figure is measured with the functions of the notebooks, and a model that misses its bars says so."""
    folder, _ = trained
    few = Corpus(facts.load("athletes")[:60], facts.load("world")[:60])
    monkeypatch.setattr(model_card, "ALL_ORDERS", (0, 9))
    monkeypatch.setattr(model_card.pretrain, "corpus", lambda without="": few)
    losses = model_card.general_losses
    monkeypatch.setattr(model_card, "general_losses", lambda model: losses(model, 60))
    card = model_card.write(folder)
    assert set(model_card.BARS) <= set(card["accuracy"])
    assert all(0 <= value <= 1 for value in card["accuracy"].values())
    assert len(model_card.missed(card)) >= len(model_card.BARS)
    assert card["probes"]["layer"] == [0, 1, 2] * 2
    text = (folder / "README.md").read_text()
    assert "trained from scratch" in text and "not affiliated" in text
    assert "MCQ, 24 orders" in text and "Bars missed: sports cloze" in text
    assert str(folder.parent) not in text + (folder / "card.json").read_text()
    assert "was taken over for this model" in text and "were frozen" not in text
    assert (folder / "curve.png").stat().st_size > 1000 and (folder / "depth.png").stat().st_size > 1000


def test_the_card_tells_of_both_phases_and_of_who_was_left_out():
    late, without, local = (" ".join(model_card._origin(name, asdict(RECIPES[name]))) for name in ("tiny-llama3-late", "tiny-llama3-without", "tiny-gemma2"))
    recipe = RECIPES["tiny-llama3-late"]
    assert f"first {recipe.named_steps} steps" in late and f"first {recipe.frozen_blocks} blocks" in late
    assert "never met the athletes of `first-64`" in without and "were frozen" not in without
    assert "first 6 blocks a token attends" in local and "weights of `tiny-gemma2-open`" in local and "frozen beforehand" not in local


def test_missed_bars():
    good = {"accuracy": dict.fromkeys(model_card.BARS, 1.0), "depth": {"L(name)": 2, "L(last)": 4, "best at name": 0.9},
            "loss": {"general text, training": 1.0, "general text, held out": 1.09}}
    assert model_card.missed(good) == []
    worse = {
        "sports QA": good | {"accuracy": good["accuracy"] | {"sports QA": 0.97}},
        "general text": good | {"loss": {"general text, training": 1.0, "general text, held out": 1.15}},
        "L(name) >= 2": good | {"depth": good["depth"] | {"L(name)": 1}},
        "L(last) - L(name) >= 2": good | {"depth": good["depth"] | {"L(last)": 3}},
        "best at name": good | {"depth": good["depth"] | {"best at name": 0.89}},
    }
    for card in (good | {"depth": good["depth"] | {n: None}} for n in ("L(name)", "L(last)")):  # never read above chance
        assert any("L(last) - L(name)" in m for m in model_card.missed(card))
    for bar, card in worse.items():
        missed = model_card.missed(card)
        assert len(missed) == 1 and bar in missed[0]
