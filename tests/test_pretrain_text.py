"""Training text of the bundled models, its tokenizer and its batches."""

import random
import re
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from pretrain_cases import TINY, source

from helpers import pretrain
from helpers.documents import declarative_only, held_out
from helpers.pretrain import RECIPES, batches
from helpers.prompts import LETTERS


@pytest.fixture(scope="module")
def tokenizer(source):
    return pretrain.tokenizer_for(RECIPES["tiny-llama3"], source)


@pytest.fixture(scope="module")
def texts(source):
    """As many training documents as a hundred steps or so see."""
    return [source.document(random.Random(f"test-{i}")) for i in range(5000)]


# Documents ----------------------------------------------------------------------------------------


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


# Vocabulary ---------------------------------------------------------------------------------------


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


# Batches ------------------------------------------------------------------------------------------


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
