"""Clean and corrupted prompts differ in the subject's tokens and nothing else, in every format."""

import families
import localization_cases as cases
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.facts import load
from helpers.localization.counterfactual import pairs
from helpers.localization.positions import choose, locate, roles
from helpers.models import Model
from helpers.prompts import PromptError, build

FORMATS = [
    ("cloze", {}), ("one_shot", {}), ("few_shot", {"k": 2}), ("qa", {"shot": True, "system": True}), ("paraphrase", {"which": 1}),
    ("neighborhood", {"n": 2}), ("mcq", {"order": 5}), ("mcq", {"shot": True}), ("capitalised", {}), ("attribute", {"name": "league"}),
]


@pytest.fixture(scope="module")
def athletes():
    return load("athletes")[:60]


@pytest.fixture(scope="module")
def model(athletes):
    """A tokenizer that splits names into pieces, on the bundled athletes; the weights do not matter."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<bos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words = " NFL NBA MLB PGA Football Basketball Baseball Golf"
    pieces.train_from_iterator([f" {f.subject} {f.relation.cloze} {f.answer}{words}" for f in athletes], trainer)
    pieces.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return Model.of(families.build("llama", vocab_size=800), PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<bos>"))


@pytest.mark.parametrize("format, options", FORMATS, ids=[f"{name}-{len(options)}" for name, options in FORMATS])
def test_prompts_line_up_in_every_format(model, athletes, format, options):
    found = pairs(model, athletes, format, **options)
    clean, corrupted = found.clean, found.corrupted
    assert len(found) >= 40 and len(clean) == len(corrupted)
    assert torch.equal(clean.mask, corrupted.mask) and torch.equal(clean.subject, corrupted.subject)
    assert (clean.last == clean.tokens.shape[1] - 1).all()
    columns = torch.arange(clean.tokens.shape[1])
    inside = (columns >= clean.subject[:, :1]) & (columns < clean.subject[:, 1:])
    differ = clean.tokens != corrupted.tokens
    assert differ.any(1).all() and not (differ & ~inside).any()
    for row in range(len(found)):
        one, other = clean.facts[row], corrupted.facts[row]
        assert one.relation.name == other.relation.name and one.answer != other.answer == one.edit
        assert other.subject in corrupted.texts[row] and other.subject not in clean.texts[row]
    # the counterfactual answer is the partner's, spelled as this format spells it
    assert torch.equal(corrupted.answer_ids, clean.edit_ids) and torch.equal(corrupted.edit_ids, clean.answer_ids)
    assert torch.equal(found.answers, torch.stack([clean.answer_ids, corrupted.answer_ids], 1))
    own = build(model.tokenizer, athletes, format, **options)
    true = {text: int(i) for text, i in zip(own.texts, own.answer_ids)}
    assert all(true[text] == int(i) for text, i in zip(clean.texts, clean.answer_ids) if text in true)


def test_mcq_offers_the_counterfactual_answer(model, athletes):
    found = pairs(model, athletes, "mcq")
    for text, other in zip(found.clean.texts, found.corrupted.facts):
        assert f": {other.answer}\n" in text


def test_a_seed_decides_and_the_company_does_not(model, athletes):
    one, two = pairs(model, athletes, "cloze", seed=1), pairs(model, athletes, "cloze", seed=1)
    assert one.corrupted.texts == two.corrupted.texts
    assert one.corrupted.texts != pairs(model, athletes, "cloze", seed=2).corrupted.texts
    few = pairs(model, athletes[:8], "cloze", partners=athletes, seed=1)
    everyone = dict(zip(one.clean.texts, one.corrupted.texts))
    assert [everyone[text] for text in few.clean.texts] == list(few.corrupted.texts)


def test_facts_without_partner_are_dropped_and_counted():
    model = cases.model("llama")
    facts = cases.facts(16, lengths=(1, 1, 1, 1, 1, 1, 3, 1))
    found = pairs(model, facts, "cloze")
    assert [f.subject for f in found.dropped] == [f.subject for f in facts if len(f.subject.split()) == 3]
    assert len(found) + len(found.dropped) == 16
    part = found[torch.tensor([2, 0])]
    assert part.clean.texts == (found.clean.texts[2], found.clean.texts[0])
    assert part.corrupted.texts == (found.corrupted.texts[2], found.corrupted.texts[0])


def test_errors(model, athletes):
    with pytest.raises(PromptError, match=r"0 of 2 prompts have a partner .* 4 are needed: give more `partners`"):
        pairs(cases.model("llama"), cases.facts(2), "cloze")
    with pytest.raises(PromptError, match="'dashed' is scored on whole answers"):
        pairs(model, athletes, "dashed")
    with pytest.raises(PromptError, match="unknown format 'clozes'"):
        pairs(model, athletes, "clozes")
    with pytest.raises(PromptError, match="format 'mcq': got an unexpected keyword argument 'which'"):
        pairs(model, athletes, "mcq", which=1)


# Positions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_token_has_one_role(side):
    prompts = cases.prompts(8, side)
    found = roles(prompts, after=2)
    assert torch.equal(sum(where.int() for where in found.values()), prompts.mask.int())
    by_row = [{name: int(where[row].sum()) for name, where in found.items()} for row in range(8)]
    # "Fact : w w | w3 w4 w5 w6 w7"
    assert by_row[0] == {"before subject": 2, "subject first": 1, "subject middle": 0, "subject last": 1,
                         "after subject 1": 1, "after subject 2": 1, "later": 2, "last": 1}
    # one token: last, not first; "Fact : w15 w16 w17 | w | w18", whose token after the subject is the last
    assert [by_row[5][name] for name in ("before subject", "subject first", "subject last", "after subject 1", "last")] == [5, 0, 1, 0, 1]
    assert by_row[7]["subject middle"] == 2


def test_a_subject_at_the_end_is_last():
    prompts = build(families.tokenizer(), cases.facts(4)[[0, 2]], "paraphrase", which=1)
    found = locate(prompts)
    assert not found["subject last"].any() and found["last"].sum(1).tolist() == [1, 1]
    assert found["subject"].sum(1).tolist() == found["all"].sum(1).tolist() == [2, 3]


def test_positions_to_choose_from():
    prompts = cases.prompts(4)
    assert choose(prompts, after=1) == ["subject first", "subject middle", "subject last", "after subject 1", "later", "last"]
    assert choose(prompts, ["last", "before subject", "all"]) == ["last", "before subject", "all"]
    with pytest.raises(ValueError, match=r"positions \['end'\]: allowed are before subject, subject first"):
        choose(prompts, ["end"])
    with pytest.raises(ValueError, match=r"\['subject middle'\]: none of the 2 prompts has such a token"):
        choose(cases.prompts(2), ["subject middle"])
    with pytest.raises(ValueError, match=r"positions \[\]"):
        choose(prompts, [])
