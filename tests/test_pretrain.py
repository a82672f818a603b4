"""Training text, its tokenizer, and training that a kill cannot change."""

import json
import random
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice

import pytest
import torch

from helpers import facts, model_card, pretrain
from helpers.documents import Corpus, declarative_only, held_out
from helpers.models import load_model
from helpers.pretrain import RECIPES, Recipe, batches, train
from helpers.prompts import LETTERS

TINY = Recipe("llama3", n_kv_heads=1, n_layers=2, d_model=32, n_heads=2, d_mlp=48, n_merges=100, steps=12,
              batch_tokens=480, warmup=4, seed=3)


@pytest.fixture(scope="module")
def source():
    return pretrain.corpus()


@pytest.fixture(scope="module")
def tokenizer(source):
    return pretrain.tokenizer_for(RECIPES["tiny-llama3"], source)


@pytest.fixture(scope="module")
def texts(source):
    """As many training documents as a hundred steps or so see."""
    return [source.document(random.Random(f"test-{i}")) for i in range(5000)]


# Documents ------------------------------------------------------------------------------------------


def subject_of(text: str, names: set[str]) -> str | None:
    """The athlete whom the last question or statement of a document is about."""
    last = text[text.rindex("Question:"):] if "Question:" in text else text.split("\n")[-1]
    words = last.split()
    for size in (4, 3, 2, 1):
        for start in range(len(words) - size + 1):
            phrase = " ".join(words[start:start + size])
            for name in (phrase, phrase.strip(",:()?")):
                if name in names:
                    return name
    return None


def test_some_athletes_are_shown_in_declarative_sentences_only(source):
    """They are never asked about: not in QA, not in MCQ, not after a solved example, not in another spelling."""
    names = {f.subject for f in source.athletes}
    sparse = {f.subject for f in source.athletes if declarative_only(f)}
    assert 0.25 < len(sparse) / len(names) < 0.35
    asked, stated, rng = Counter(), Counter(), random.Random("asked")
    for _ in range(12000):
        text = source.athlete(rng)
        subject = subject_of(text, names)
        assert subject is not None, text
        (asked if "Question:" in text or "\n" in text else stated)[subject] += 1
    assert not sparse & set(asked)
    assert len(asked) > 0.95 * len(names - sparse)  # the others are asked about
    assert len(sparse & set(stated)) > 0.95 * len(sparse)
    # and the sparse ones are shown as often as the others, only differently
    share = sum(stated[n] for n in sparse) / 12000
    assert share == pytest.approx(len(sparse) / len(names), abs=0.02)


def test_every_sport_has_declarative_only_athletes(source):
    counts = Counter(f.answer for f in source.athletes if declarative_only(f))
    assert len(counts) == 3
    assert max(counts.values()) < 1.5 * min(counts.values())


def test_documents_say_what_is_true(source, texts):
    """Plain statements and answers to questions, read back from the text."""
    truth = {(f.relation.name, f.subject): f.answer for f in (*source.athletes, *source.world)}
    relations = {f.relation.name: f.relation for f in (*source.athletes, *source.world)}
    pattern = lambda template: re.compile(re.escape(template).replace(r"\{subject\}", "(.+)"))
    read = {
        "cloze": [(name, pattern("Fact: " + r.cloze + " ANSWER")) for name, r in relations.items()],
        "qa": [(name, pattern("Question: " + r.question + " Answer: ANSWER")) for name, r in relations.items()],
        "mcq": [(name, pattern("Question: " + r.question)) for name, r in relations.items()],
    }
    checked = Counter()
    for text in texts:
        mcq = re.search(r"(Question: [^\n]+)\n((?:[A-D]: [^\n]+\n){4})Answer: ([A-D])$", text)
        if mcq:
            kind, last, answer = "mcq", mcq[1], dict(re.findall(r"([A-D]): (.+)", mcq[2]))[mcq[3]]
        else:
            *_, answer = words = text.split("\n")[-1].split(" ")
            last = " ".join([*words[:-1], "ANSWER"])
            kind = "qa" if last.startswith("Question") else "cloze"
        for name, template in read[kind]:
            match = template.fullmatch(last)
            if match and (name, match[1]) in truth:
                true = truth[name, match[1]]
                assert answer in (true, true.capitalize(), "-".join(true)), text
                checked[kind, name] += 1
    for kind in read:
        assert {name for k, name in checked if k == kind} == set(relations)


def test_held_out_text_is_never_drawn(source, texts):
    held = [source.general(random.Random(f"held-{i}"), held=True) for i in range(1500)]
    assert all(map(held_out, held))
    sums = {t for t in held if t.startswith("Sum")}
    assert len(sums) > 40  # of 2,500 sums, a tenth is held out: training would have met these
    rng = random.Random("general")
    drawn = {source.general(rng) for _ in range(15000)}
    assert len({t for t in drawn if t.startswith("Sum")}) > 500
    assert not drawn & set(held)
    assert not set(texts) & set(held)
    assert not any(held_out(t) for t in drawn)


def test_held_out_text_is_of_the_same_kinds(source):
    kind = lambda text: text.split(":")[0] if ":" in text else "prose"
    one, two = (Counter(kind(source.general(random.Random(f"{held}-{i}"), held)) for i in range(2000)) for held in (False, True))
    assert set(one) == set(two)
    for k in one:
        assert one[k] / 2000 == pytest.approx(two[k] / 2000, abs=0.06), k


def test_documents_follow_from_the_generator(source):
    draw = lambda seed: [source.document(random.Random(seed)) for _ in range(3)]
    assert draw(1) == draw(1) != draw(2)


# Vocabulary -----------------------------------------------------------------------------------------


def test_answers_letters_and_sports_are_single_tokens(source, tokenizer):
    closed = {*LETTERS, "golf", "NFL", "NBA", "MLB", "PGA"}
    for fact in (*source.athletes, *source.world):
        closed |= {fact.answer, fact.edit, *fact.distractors, *fact.relation.options}
        closed |= {value for a in fact.relation.attributes for _, value in a.pairs}
    closed |= {sport.capitalize() for sport in source.athletes[0].relation.options}
    ids = {word: tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in closed}
    assert {word: i for word, i in ids.items() if len(i) != 1} == {}
    assert len({i[0] for i in ids.values()}) == len(closed)  # and different ones


def test_names_have_several_tokens(source, tokenizer):
    lengths = [len(tokenizer(" " + f.subject, add_special_tokens=False)["input_ids"]) for f in source.athletes]
    assert 4 <= sum(lengths) / len(lengths) <= 9
    assert sum(n == 1 for n in lengths) == 0


def test_text_survives_the_tokenizer(tokenizer, texts):
    for text in texts[:300]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
        assert len(tokenizer.tokenize(text)) == len(ids) - 1


def test_the_tokenizer_is_the_same_each_time(source, tokenizer):
    again = pretrain.tokenizer_for(RECIPES["tiny-llama3"], pretrain.corpus())
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


# Batches --------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(pretrain, "CHUNK", 150)


def test_batches_can_start_anywhere(source, tokenizer, small_chunks):
    stream = list(islice(batches(source, tokenizer, TINY), 40))
    for start in (1, 9, 25):
        for a, b in zip(stream[start:], batches(source, tokenizer, TINY, start)):
            assert torch.equal(a, b)


def test_batches_depend_on_the_seed_and_never_repeat(source, tokenizer, small_chunks):
    draw = lambda seed: {b.numpy().tobytes() for b in islice(batches(source, tokenizer, replace(TINY, seed=seed)), 40)}
    assert len(draw(0)) == 40
    assert not draw(0) & draw(1)


def test_batches_are_whole_documents(source, tokenizer, small_chunks):
    for tokens in islice(batches(source, tokenizer, TINY), 30):
        assert tokens.shape[1] in pretrain.BUCKETS
        assert len(tokens) == TINY.batch_tokens // tokens.shape[1]
        assert (tokens[:, 0] == tokenizer.bos_token_id).all()
        for row in tokens:
            end = (row == tokenizer.eos_token_id).nonzero().flatten()
            assert len(end) == 1
            assert (row[end[0] + 1:] == tokenizer.pad_token_id).all() and (row[:end[0]] != tokenizer.pad_token_id).all()


def test_nothing_is_too_long_for_the_longest_bucket(tokenizer, texts):
    """A document over the longest bucket is dropped in silence: there must be none, or nearly."""
    lengths = [len(ids) + 1 for ids in tokenizer(texts)["input_ids"]]
    assert sum(n > pretrain.BUCKETS[-1] for n in lengths) / len(lengths) < 0.01


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gemma"])
def test_loss_ignores_padding(source, tokenizer, family):
    recipe = replace(TINY, family=family)
    model = pretrain.new_model(recipe, tokenizer).eval()
    tokens = next(batches(source, tokenizer, recipe))
    wider = torch.nn.functional.pad(tokens, (0, 9), value=tokenizer.pad_token_id)
    with torch.no_grad():
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        loss, same = (pretrain.loss_of(model, t, pad, eos, 1.0) for t in (tokens, wider))
        total = count = 0
        for row in tokens[:, :]:
            ids = row[row != tokenizer.pad_token_id][None]
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert loss.item() == pytest.approx(same.item(), abs=1e-5)
    assert loss.item() == pytest.approx(total / count, abs=1e-4)


def test_the_answer_counts_as_often_as_the_recipe_says(source, tokenizer):
    """Only the last token before EOS is weighted: by hand, over one document at a time."""
    model = pretrain.new_model(TINY, tokenizer).eval()
    tokens = next(batches(source, tokenizer, TINY))[:6]
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    with torch.no_grad():
        found = pretrain.loss_of(model, tokens, pad, eos, 8.0)
        total = count = 0
        for row in tokens:
            ids = row[row != pad]
            losses = torch.nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
            assert ids[-1] == eos
            weights = torch.ones(len(losses))
            weights[-2] = 8
            total, count = total + (losses * weights).sum(), count + weights.sum()
    assert found.item() == pytest.approx((total / count).item(), abs=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_small_and_of_their_family(name, tokenizer):
    recipe = RECIPES[name]
    model = pretrain.new_model(recipe, tokenizer)
    assert model.num_parameters() * 2 < 10 * 2**20  # bytes in bf16
    assert model.config.head_dim * recipe.n_heads == recipe.d_model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if recipe.family == "gemma2":
        assert model.config.query_pre_attn_scalar == model.config.head_dim
        assert len({*model.config.layer_types}) == 2


def test_learning_rate():
    recipe = replace(TINY, steps=1000, warmup=100)
    rates = [pretrain.rate_at(step, recipe) for step in range(1001)]
    peak = recipe.learning_rate
    assert rates[0] == pytest.approx(peak / 100) and max(rates) <= peak
    assert rates[99] == pytest.approx(peak, rel=0.03)
    assert all(a < b for a, b in zip(rates[:99], rates[1:99]))
    assert all(a > b for a, b in zip(rates[100:], rates[101:]))
    assert rates[1000] == pytest.approx(recipe.final_rate * peak)


# Training -------------------------------------------------------------------------------------------


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


# Model card -----------------------------------------------------------------------------------------


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
