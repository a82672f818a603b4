"""Prompts as tokens: answers and subjects are found under tokenizers of every kind; what does not fit is refused."""

import itertools
import re
from dataclasses import replace

import families
import pytest
import torch
from facts_cases import athletes, world
from prompts_cases import decoded, sample, with_bos
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CanineTokenizer, PreTrainedTokenizerFast

from helpers import facts, metrics, prompts
from helpers.facts import Fact, Facts, Relation
from helpers.models import Model
from helpers.prompts import FORMATS, PromptError, build, tokenize

SPORTS = ("baseball", "basketball", "football", "golf")


@pytest.fixture(scope="module")
def no_bos(with_bos):
    """The same vocabulary without a BOS and, as in Pythia, without a padding token."""
    bare = Tokenizer.from_str(with_bos.backend_tokenizer.to_str())
    bare.post_processor = None
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>")


@pytest.fixture(scope="module")
def characters():
    """One token a character: every answer has many tokens, the first of which is a space."""
    return bpe(merges=[])


def bpe(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Characters and merges, applied across word boundaries as in a tokenizer without pre-tokenization."""
    letters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocab = {token: i for i, token in enumerate(["<eos>", *letters, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", clean_up_tokenization_spaces=False)


def words() -> PreTrainedTokenizerFast:
    """One token a word, all words the same one but for a few."""
    vocab = {w: i for i, w in enumerate(["<unk>", "New", "Old", "York", "Delhi", "Haven", "Rome", "Sarum"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def a_fact(answer, edit, *distractors, subject="the place", cloze="{subject} is"):
    return Fact(subject, Relation("where", cloze, question="Where is {subject}?"), answer, edit, (edit, *distractors))


def attribute_names(data: Facts):
    return [a.name for a in data[0].relation.attributes]


# Tokens -------------------------------------------------------------------------------------------


def each_format(data: Facts, pool: Facts):
    """Every format with options, for these facts."""
    yield from [("cloze", {}), ("one_shot", {}), ("few_shot", {"pool": pool}), ("qa", {"system": True, "shot": True}),
                ("paraphrase", {"which": 2}), ("neighborhood", {"pool": pool, "n": 2}), ("mcq", {"order": 9, "shot": True})]
    if data[0].relation.name == "sport":
        yield from [("capitalised", {}), ("dashed", {}), *(("attribute", {"name": n}) for n in attribute_names(data))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["with_bos", "no_bos"])
@pytest.mark.parametrize("name", ["athletes", "world"])
def test_ids_decode_to_answers_and_subjects(request, kind, name, side):
    tokenizer, pool = request.getfixturevalue(kind), request.getfixturevalue(name)
    data = sample(pool)
    for format, options in each_format(data, pool):
        made, texts = build(tokenizer, data, format, side, **options), FORMATS[format](data, **options)
        assert len(made) == len(texts)
        for i, prompt in enumerate(texts):
            real = made.mask[i].bool()
            assert decoded(tokenizer, [t for t in made.tokens[i][real] if t != tokenizer.bos_token_id]) == prompt.text
            assert made.last[i] == real.nonzero().max()
            assert decoded(tokenizer, made.tokens[i, made.last[i]:made.last[i] + 1]) == re.split(r"\s|(?=:)", prompt.text)[-1]
            first, end = made.subject[i].tolist()
            # the span is the subject and at most what the tokenizer glues to it: nothing for these
            assert decoded(tokenizer, made.tokens[i, first:end]) == prompt.subject
            assert prompt.text[:prompt.start].endswith(decoded(tokenizer, made.tokens[i, first - 1:first]) + " ")
            assert [decoded(tokenizer, list(option)) for option in made.option_tokens[i]] == list(prompt.options)
            if format != "dashed":
                for token, option in zip(made.option_ids[i], prompt.options):
                    assert decoded(tokenizer, [token]) == option


@pytest.mark.parametrize("subject", ["São Paulo", "Łódź", "東京", "O'Fallon", "St. John's", "Winston-Salem", "X", "the 1972 Olympics"])
def test_spans_of_unusual_names(with_bos, no_bos, subject):
    for tokenizer in (with_bos, no_bos):
        facts_asked = Facts(tuple(
            replace(a_fact("football", "golf", subject=s), paraphrases=("Why not see {subject}, the home of",))
            for s in (subject, "a place that many people have seen")))
        for format, side in itertools.product(("cloze", "qa", "paraphrase"), ("left", "right")):
            made = build(tokenizer, facts_asked, format, side)
            first, end = made.subject[0].tolist()
            assert decoded(tokenizer, made.tokens[0, first:end]) == subject
            assert made.mask[0, first:end].all()


@pytest.mark.parametrize("format", ["cloze", "one_shot", "mcq"])
def test_a_bos_only_shifts(athletes, with_bos, no_bos, format):
    a, b = (build(t, athletes[:20], format) for t in (with_bos, no_bos))
    assert torch.equal(a.subject, b.subject + 1) and torch.equal(a.last, b.last + 1)
    assert torch.equal(a.option_ids, b.option_ids)
    for i in range(20):
        assert a.tokens[i][a.mask[i].bool()].tolist() == [with_bos.bos_token_id, *b.tokens[i][b.mask[i].bool()].tolist()]


@pytest.mark.parametrize("kind", ["with_bos", "no_bos"])
@pytest.mark.parametrize("family", ["llama", "neox", "gemma2"])
def test_left_and_right_padding_give_the_same_logits(request, athletes, world, family, kind):
    tokenizer = request.getfixturevalue(kind)
    model = Model.of(families.build(family, vocab_size=len(tokenizer), max_position_embeddings=128), tokenizer, family)
    data = Facts((*sample(athletes, 8), *sample(world, 8)))
    right, left = (build(tokenizer, data, "cloze", side) for side in ("right", "left"))
    lengths = right.mask.sum(1)
    assert lengths.min() < lengths.max() and torch.equal(lengths, left.mask.sum(1))
    one, two = (metrics.last_logits(model, p) for p in (right, left))
    torch.testing.assert_close(one, two, atol=2e-5, rtol=0)
    for i in range(len(data)):  # and as without any padding
        alone = model.hf(input_ids=right.tokens[i:i + 1, :lengths[i]]).logits[0, -1]
        torch.testing.assert_close(one[i], alone, atol=2e-5, rtol=0)
    # the test can fail: a pass that sees the padding gives something else
    seen = model.hf(input_ids=left.tokens, position_ids=left.position_ids).logits[:, -1]
    padded = lengths < lengths.max()
    assert ((seen - two).abs().amax(1) > 1e-3).tolist() == padded.tolist()


def test_padding_leaves_the_tokenizer_alone(athletes, with_bos):
    before = with_bos.padding_side, with_bos.backend_tokenizer.to_str()
    build(with_bos, athletes[:4], "cloze", "left")
    assert (with_bos.padding_side, with_bos.backend_tokenizer.to_str()) == before


def test_positions_count_real_tokens(athletes, with_bos):
    for side in ("left", "right"):
        made = build(with_bos, athletes[:20], "cloze", side)
        for row, mask in zip(made.position_ids, made.mask.bool()):
            assert row[mask].tolist() == list(range(int(mask.sum())))
            assert (row >= 0).all()


def test_subsets_keep_rows_together(athletes, with_bos):
    made = build(with_bos, athletes[:6], "cloze")
    keep = torch.tensor([False, True, False, False, True, False])
    for part in (made[[1, 4]], made[1:5:3], made[torch.tensor([1, 4])], made[keep], made[keep.tolist()]):
        assert [f.subject for f in part.facts] == [athletes[1].subject, athletes[4].subject]
        assert part.texts == (made.texts[1], made.texts[4])
        assert part.option_tokens == (made.option_tokens[1], made.option_tokens[4])
        for name in ("tokens", "mask", "last", "subject", "option_ids", "position_ids"):
            assert torch.equal(getattr(part, name), getattr(made, name)[[1, 4]])
    assert len(made[made.option_ids[:, 0] < 0]) == 0


def test_dashed_is_scored_whole(athletes, with_bos):
    made = build(with_bos, athletes[:5], "dashed")
    assert made.whole and not build(with_bos, athletes[:5], "capitalised").whole
    for fact, options in zip(athletes, made.option_tokens):
        assert decoded(with_bos, list(options[0])) == "-".join(fact.answer)
        assert len(set(options)) == 4
        assert (made.option_ids[:, :2] >= 0).all()  # though true and edit answer may begin alike


# Tokenizers and answers that do not fit -----------------------------------------------------------


def test_an_answer_that_merges_with_the_prompt():
    fact = Facts((a_fact("Rome", "York"),))
    assert build(bpe([(" ", "R"), (" ", "Y")]), fact, "cloze").option_tokens  # harmless merges
    with pytest.raises(PromptError, match="the answer 'Rome' changes how .*the place is"):
        build(bpe([("s", " ")]), fact, "cloze")


def test_the_seam_is_checked_after_each_prompt_not_only_the_first():
    """Two templates, one answer: only after the second template does the answer change the prompt's tokens."""
    pair = (a_fact("Rome", "York"), a_fact("Rome", "York", subject="it", cloze="{subject} lies in"))
    merging = bpe([("n", " "), (" ", "R"), (" ", "Y")])
    assert len(build(merging, Facts(pair[:1]), "cloze")) == 1
    for order in (pair, pair[::-1]):
        with pytest.raises(PromptError, match="changes how .*lies in"):
            build(merging, Facts(order), "cloze")


def test_answers_that_share_their_first_token(characters):
    with pytest.raises(PromptError, match="'the place': the answers 'New York' and 'New Delhi' share their first token"):
        build(words(), Facts((a_fact("New York", "New Delhi"),)), "cloze")
    with pytest.raises(PromptError, match="share their first token"):
        build(characters, Facts((a_fact("Rome", "York"),)), "cloze")


def test_attributes_that_two_answers_share():
    same = facts.Attribute("river", "{subject} has the river", (("Rome", "Old"), ("York", "Old")))
    fact = a_fact("Rome", "York")
    fact = replace(fact, relation=replace(fact.relation, attributes=(same,)))
    with pytest.raises(PromptError, match="'Old' and 'Old' share"):
        build(words(), Facts((fact,)), "attribute", name="river")


def test_distractors_that_cannot_be_told_apart_are_left_out():
    names = ["<unk>", "New", "Old", "York", "Delhi", "Haven", "Rome", "Sarum"]
    made = build(words(), Facts((
        a_fact("Rome", "New York", "New Delhi", "Old Sarum"),  # shares the edit answer's first token
        a_fact("New York", "Rome", "Haven", "New Delhi"),  # the true answer's
        a_fact("Rome", "York", "New Delhi", "New Haven"),  # another distractor's: one token must not count twice
        a_fact("Rome", "York"),  # fewer options than the others
    )), "cloze")
    firsts = [[names[t] if t >= 0 else None for t in row] for row in made.option_ids.tolist()]
    assert firsts == [["Rome", "New", None, "Old"], ["New", "Rome", "Haven", None], ["Rome", "York", "New", None], ["Rome", "York", None, None]]
    assert [len(row) for row in made.option_tokens] == [4, 4, 4, 2]  # whole answers can still be compared


def test_slow_tokenizer(athletes):
    with pytest.raises(PromptError, match="CanineTokenizer gives no character offsets"):
        build(CanineTokenizer(), athletes[:2], "cloze")


def test_a_tokenizer_that_closes_texts(athletes, with_bos):
    closing = Tokenizer.from_str(with_bos.backend_tokenizer.to_str())
    closing.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", with_bos.eos_token_id)])
    with pytest.raises(PromptError, match="add_eos_token=False"):
        build(PreTrainedTokenizerFast(tokenizer_object=closing, eos_token="<eos>"), athletes[:2], "cloze")


@pytest.mark.parametrize("format", ["capitalised", "dashed"])
def test_spelling_needs_lower_case_answers(world, format):
    upper = world.where(lambda f: f.answer != f.answer.lower())
    lower = world.where(lambda f: f.relation.name == "musician_instrument")
    assert all(f.answer == f.answer.lower() for f in lower)
    assert len(FORMATS[format](lower[:5])) == 5
    with pytest.raises(PromptError, match=f"format '{format}' needs lower-case answers; '{re.escape(upper[0].subject)}'"):
        FORMATS[format](upper[:1])
    with pytest.raises(PromptError, match="needs lower-case answers"):  # the edit answer is spelled as well
        FORMATS[format](Facts((replace(lower[0], edit="French horn", distractors=("French horn",)),)))


@pytest.mark.parametrize("format, options, message", [
    ("clozze", {}, "unknown format 'clozze'; formats are cloze, one_shot"),
    ("cloze", {"which": 1}, "format 'cloze': .*'which'.*its options are none"),
    ("qa", {"sytem": True}, "format 'qa': .*'sytem'.*its options are system, shot, pool"),
    ("attribute", {}, "format 'attribute': .*'name'"),
    ("attribute", {"name": "height"}, r"no attribute 'height'; it has \['league', 'venue'\]"),
    ("paraphrase", {"which": 3}, "has 3 paraphrases; which=3"),
    ("paraphrase", {"which": -1}, "which=-1"),
    ("mcq", {"order": 24}, "order=24: .*0 to 23"),
    ("mcq", {"order": -1}, "order=-1"),
    ("cloze", {"side": "Left"}, "side='Left'"),
    ("few_shot", {"k": 5000}, "k=5000 needs 5000 other cases"),
])
def test_what_cannot_be_asked(athletes, with_bos, format, options, message):
    with pytest.raises(PromptError, match=message):
        build(with_bos, athletes[:3], format, **options)


def test_facts_that_cannot_be_asked(athletes, with_bos):
    with pytest.raises(PromptError, match="no facts to ask about"):
        build(with_bos, athletes[:0], "cloze")
    with pytest.raises(PromptError, match="an MCQ needs three distractors; 'the place'"):
        prompts.mcq(Facts((a_fact("Rome", "York", "Haven"),)))
    with pytest.raises(PromptError, match="no solved case .*other than 'Rome' and 'York'"):
        prompts.one_shot(Facts((a_fact("Rome", "York"), a_fact("York", "Rome", subject="it"))))
    with pytest.raises(PromptError, match="no other fact .*'basketball': no neighborhood prompt for 'Ray Allen'"):
        prompts.neighborhood(athletes.where(lambda f: f.subject == "Ray Allen"))


def test_a_tokenizer_that_drops_the_subject():
    ascii_only = words()
    ascii_only.backend_tokenizer.normalizer = normalizers.Replace(Regex("[^ -~]"), "")
    with pytest.raises(PromptError, match="leaves nothing of the subject 'Ελλάς'"):
        build(ascii_only, Facts((a_fact("Rome", "York", subject="Ελλάς"),)), "cloze")


def test_custom_prompts(with_bos, athletes):
    """A format of one's own: any text, with the subject where it says."""
    fact = athletes[0]
    text = f"Everybody knows {fact.subject}, the star of"
    made = tokenize(with_bos, [prompts.Prompt(fact, text, text.index(fact.subject), fact.subject, SPORTS)])
    assert (made.format, decoded(with_bos, made.tokens[0, slice(*made.subject[0].tolist())])) == ("custom", fact.subject)
