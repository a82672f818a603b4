"""Metrics: scores against hand computation, and batched passes against naive ones."""

import math

import families
import numpy as np
import pandas as pd
import pytest
import torch
from facts_cases import athletes, world
from prompts_cases import with_bos
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from helpers import metrics
from helpers.facts import Fact, Facts, Relation
from helpers.models import Model
from helpers.prompts import LATIN_SQUARE, ORDERS, PromptSet, build

SPORT = Relation("sport", "{subject} plays")


@pytest.fixture(scope="module")
def tokenizer(with_bos):
    return with_bos


@pytest.fixture(scope="module", params=["llama", "gemma2", "neox"])
def model(request, tokenizer):
    """A random model; GPT-NeoX with a tokenizer that has neither BOS nor padding token, as Pythia."""
    if request.param == "neox":
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.post_processor = None
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    return Model.of(families.build(request.param, vocab_size=len(tokenizer), max_position_embeddings=128), tokenizer, request.param)


@pytest.fixture
def mixed(athletes, world):
    """Facts whose prompts differ in length, and in the number of options."""
    return Facts((*athletes[:5], *world[:8]))


def two_prompts() -> PromptSet:
    """Two prompts over a vocabulary of five; the second lacks its third option."""
    items = tuple(Fact(s, SPORT, "a", "b") for s in ("one", "two"))
    zero = torch.zeros(2, 1, dtype=torch.long)
    return PromptSet(items, "cloze", ("x", "y"), zero, zero + 1, zero[:, 0], zero.repeat(1, 2),
                     option_ids=torch.tensor([[1, 2, 4], [3, 0, -1]]), option_tokens=(((1,), (2,), (4,)), ((3,), (0,))))


# Scores ---------------------------------------------------------------------------------------------


def test_scores_by_hand():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.35, 0.05], [0.25, 0.05, 0.1, 0.4, 0.2]])) + torch.tensor([[3.0], [-7.0]])
    table = metrics.scores(logits, two_prompts())
    expected = pd.DataFrame({
        "subject": ["one", "two"], "relation": "sport", "answer": "a", "edit": "b", "format": "cloze",
        "p_true": [0.2, 0.4], "p_edit": [0.3, 0.25], "top_true": [0.0, 1.0], "top_edit": [0.0, 0.0],
        "q_true": [0.2 / 0.55, 0.4 / 0.65], "q_edit": [0.3 / 0.55, 0.25 / 0.65], "pick_true": [0.0, 1.0], "pick_edit": [1.0, 0.0],
    })
    pd.testing.assert_frame_equal(table, expected, check_like=True, atol=1e-6, rtol=0)


def test_a_tie_is_a_pick_of_neither():
    """Logits of a bf16 model tie often; the true answer stands first among the options and must not win by that."""
    table = metrics.scores(torch.zeros(2, 5), two_prompts())
    assert table[["pick_true", "pick_edit"]].to_numpy().sum() == 0
    assert table["q_true"].tolist() == pytest.approx([1 / 3, 1 / 2])


def test_a_wrecked_model_scores_nothing():
    table = metrics.scores(torch.full((2, 5), float("nan")), two_prompts())
    assert table[["top_true", "top_edit", "pick_true", "pick_edit"]].to_numpy().max(axis=0).tolist()[2:] == [0.0, 0.0]
    assert table["p_true"].isna().all()


def test_restricted_scores_are_shares_of_the_options(model, mixed):
    prompts = build(model.tokenizer, mixed, "cloze")
    logits = metrics.last_logits(model, prompts)
    table = metrics.scores(logits, prompts)
    for i, row in table.iterrows():
        ids = [t for t in prompts.option_ids[i].tolist() if t >= 0]
        p = logits[i].softmax(-1)[ids]
        assert len(ids) == 4
        assert row["p_true"] == pytest.approx(p[0].item(), rel=1e-5)
        assert row["q_edit"] == pytest.approx((p[1] / p.sum()).item(), rel=1e-5)
        assert row["pick_true"] == float(p.argmax() == 0)
        assert row["top_true"] == float(logits[i].argmax() == ids[0])


# Passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_last_logits_are_those_of_a_full_pass(model, mixed, side, batch_size):
    prompts = build(model.tokenizer, mixed, "cloze", side)
    assert len(set(prompts.mask.sum(1).tolist())) > 1
    full = model.hf(input_ids=prompts.tokens, attention_mask=prompts.mask, position_ids=prompts.position_ids).logits
    expected = full[torch.arange(len(prompts)), prompts.last]
    # Rotary positions are relative and hide a wrong offset: look at what the model is given.
    given = []
    hook = model.hf.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    found = metrics.last_logits(model, prompts, batch_size)
    hook.remove()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert torch.equal(torch.cat([k["attention_mask"] for k in given]), prompts.mask)
    assert torch.equal(torch.cat([k["position_ids"] for k in given]), prompts.position_ids)


def naive_logprobs(model, prompts) -> list[list[float]]:
    """One option at a time, one token at a time, without padding."""
    rows = []
    for i, options in enumerate(prompts.option_tokens):
        rows.append([])
        for option in options:
            text, total = prompts.tokens[i][prompts.mask[i].bool()].tolist(), 0.0
            for token in option:
                total += model.hf(input_ids=torch.tensor([text])).logits[0, -1].log_softmax(-1)[token].item()
                text.append(token)
            rows[-1].append(total)
    return rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [3, 256])
def test_answer_logprobs(model, athletes, side, batch_size):
    prompts = build(model.tokenizer, athletes[:4], "dashed", side)
    lengths = {len(option) for row in prompts.option_tokens for option in row}
    assert min(lengths) > 5 and len(lengths) > 2
    found = metrics.answer_logprobs(model, prompts, batch_size)
    assert found.numpy() == pytest.approx(np.array(naive_logprobs(model, prompts)), abs=1e-3)


def test_single_token_answers_have_their_probability(model, mixed):
    prompts = build(model.tokenizer, mixed, "cloze")
    whole = metrics.answer_logprobs(model, prompts)
    assert whole[:, 0].exp().numpy() == pytest.approx(metrics.ask(model, mixed, "cloze")["p_true"].to_numpy(), rel=1e-4)


def test_absent_options_have_no_probability(model, athletes):
    three = Facts((athletes[0], Fact("Somebody", SPORT, "football", "golf")))
    prompts = build(model.tokenizer, three, "cloze")
    assert [len(row) for row in prompts.option_tokens] == [4, 2]
    found = metrics.answer_logprobs(model, prompts)
    assert (found[1] == float("-inf")).tolist() == [False, False, True, True]
    assert torch.isfinite(found[0]).all()


# Questions ------------------------------------------------------------------------------------------


def test_dashed_answers_are_scored_whole(model, athletes):
    table = metrics.ask(model, athletes[:4], "dashed")
    logp = np.array(naive_logprobs(model, build(model.tokenizer, athletes[:4], "dashed")))
    share = np.exp(logp) / np.exp(logp).sum(1, keepdims=True)
    assert table["q_true"].to_numpy() == pytest.approx(share[:, 0], rel=2e-3)
    assert table["pick_true"].tolist() == (logp.argmax(1) == 0).astype(float).tolist()
    assert not {"p_true", "top_true"} & set(table.columns)


def test_ask_keeps_facts_in_order(model, mixed):
    table = metrics.ask(model, mixed, "cloze", batch_size=3)
    assert list(zip(table["subject"], table["relation"])) == [f.key for f in mixed]
    one_by_one = [metrics.ask(model, mixed[[i]], "cloze")["p_true"].item() for i in range(len(mixed))]
    assert table["p_true"].tolist() == pytest.approx(one_by_one, rel=1e-4)


@pytest.mark.parametrize("orders", [LATIN_SQUARE, range(len(ORDERS)), (7,)])
def test_mcq_is_the_mean_over_orders(model, mixed, orders):
    table = metrics.ask_mcq(model, mixed, orders)
    each = [metrics.ask(model, mixed, "mcq", order=o) for o in orders]
    assert list(table["subject"]) == [f.subject for f in mixed]
    for column in ("p_true", "p_edit", "q_true", "q_edit", "top_true", "top_edit", "pick_true", "pick_edit"):
        by_hand = [math.fsum(t[column][i] for t in each) / len(each) for i in range(len(mixed))]
        assert table[column].tolist() == pytest.approx(by_hand, abs=1e-12), column


def test_a_model_that_always_says_the_same_letter_scores_chance(model, mixed, monkeypatch):
    """Over the Latin square, a preference for a letter says nothing about any option."""
    letter = model.tokenizer(" C", add_special_tokens=False)["input_ids"][0]

    def stubborn(model, prompts, batch_size):
        logits = torch.zeros(len(prompts), len(model.tokenizer))
        logits[:, letter] = 9.0
        return logits

    monkeypatch.setattr(metrics, "last_logits", stubborn)
    table = metrics.ask_mcq(model, mixed)
    for column in ("q_true", "q_edit", "pick_true", "pick_edit", "top_true"):
        assert table[column].tolist() == pytest.approx([0.25] * len(mixed)), column


def test_known_is_a_threshold_on_the_one_shot_probability(model, athletes):
    data = athletes[:12]
    p = metrics.ask(model, data, "one_shot")["p_true"]
    between = float(np.sort(p)[5])
    assert metrics.known(model, data, between) == data[[i for i in range(12) if p[i] >= between]]
    assert len(metrics.known(model, data, between)) == 7  # a fact at the threshold is known
    assert metrics.known(model, data, 0.0) == data
    assert len(metrics.known(model, data, 1.1)) == 0


# Text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_text_loss_is_transformers_own(model, batch_size):
    texts = ["Fact: Ray Allen plays the sport of basketball", "Sum: 3 + 4 = 7", "The red farmer paints the small window near the river."]
    total = count = 0
    for text in texts:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        total += model.hf(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert metrics.text_loss(model, iter(texts), batch_size) == pytest.approx(total / count, rel=1e-5)


def test_text_loss_of_nothing(model):
    for nothing in ([], [""]):
        with pytest.raises(ValueError, match="no text with at least two tokens"):
            metrics.text_loss(model, nothing)
