"""Examples of every format: what notebooks show is what is asked."""

from helpers import facts, prompts, survey


def test_one_fact_in_every_format():
    everything = facts.load("athletes")
    shown = survey.examples(everything, everything).set_index("question")
    assert list(shown.index) == [question.label for question in survey.questions(everything)]
    assert shown.loc["one-shot", "prompt"] == prompts.one_shot(everything[:1], everything)[0].text
    assert shown.loc["MCQ", ["format", "true"]].tolist() == ["mcq", "B"] and "B: " + everything[0].answer in shown.loc["MCQ", "prompt"]
    assert shown.loc["league", ["format", "true"]].tolist() == ["league", "NBA"]
    assert shown["asks_for"].str.len().min() > 0


def test_formats_that_a_fact_cannot_have_are_left_out():
    world = facts.load("world")
    shown = survey.examples(world, world)["question"]
    assert "dashed" not in set(shown) and {"cloze", "QA"} <= set(shown)
