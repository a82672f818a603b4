"""A user's own facts: what a file and its templates need, and what they may get wrong."""

import pytest
from facts_cases import CAPITALS, SPORTS, assert_sound, athletes, own

from helpers import facts
from helpers.facts import FactsError, load


def test_three_columns_and_a_template_are_enough(own):
    data = own(CAPITALS)
    assert len(data) == 15 and data.name == "mine"
    countries = {"France", "Japan", "Peru", "Kenya", "Chile"}
    for fact in data:
        assert fact.distractors[0] == fact.edit
        assert len(set(fact.distractors)) == 3
        assert set(fact.distractors) <= countries - {fact.answer}
    assert len({f.edit for f in data}) > 2  # drawn for each fact, not one for all
    assert data == own(CAPITALS)
    assert "{subject}" in data[0].relation.question
    assert_sound(facts.split(data, "first-6"), data)


def test_optional_columns_are_used(own):
    data = own("subject,relation,answer,edit_answer,distractors,paraphrases\n"
               "Lyon,country,France,Peru,Japan|Peru,In {subject} you are in|{subject} belongs to\n"
               "Osaka,country,Japan,,,\nIca,country,Peru,Togo,Mali|Chad|Oman|Iran,\nTalca,country,Chile,,,\n")
    lyon, osaka, ica, _ = data
    assert (lyon.edit, lyon.distractors) == ("Peru", ("Peru", "Japan", "Chile"))  # the missing third is derived
    assert lyon.paraphrases == ("In {subject} you are in", "{subject} belongs to")
    assert set(osaka.distractors) == {"France", "Peru", "Chile"}
    assert (ica.edit, ica.distractors) == ("Togo", ("Togo", "Mali", "Chad"))


def test_example_rows_are_examples(own):
    data = own(CAPITALS.replace("answer\n", "answer,role\n", 1) + "Nantes,country,France,example\nKobe,country,Japan,example\n")
    assert len(data) == 15
    assert data[0].relation.examples == (("Nantes", "France"), ("Kobe", "Japan"))


def test_bundled_templates_serve_a_users_file(own):
    data = own("subject,relation,answer\n" + "".join(f"Player {i},sport,{s}\n" for i, s in enumerate(sorted(SPORTS) * 3)), templates=None)
    assert {f.edit for f in data} <= SPORTS | {"golf"}
    assert all(len(f.distractors) == 3 for f in data)


def test_values_are_read_as_a_spreadsheet_writes_them(own):
    data = own('\ufeffsubject, relation ,answer\r\n"Washington, D.C.",country, France \r\n\r\nSão  Paulo,country,Peru\r\n')
    assert [f.subject for f in data] == ["Washington, D.C.", "São Paulo"]
    assert data[0].answer == "France"


@pytest.mark.parametrize("text, message", [
    ("subject,answer\nLyon,France\n", r"missing column\(s\) relation; found subject, answer"),
    ("", r"missing column\(s\) subject, relation, answer; found none"),
    ("subject;relation;answer\nLyon;country;France\n", "found subject;relation;answer"),
    ("subject,relation,answer\n", "mine.csv: no facts"),
    ("subject,relation,answer,answer\nLyon,country,France,Peru\n", "column stands twice"),
    (CAPITALS + "Nice,country,Peru\n", r"row 17: \(Nice, country\) stands in row 3 already"),
    (CAPITALS + "\n\nNice,country,Peru\n", r"row 19: \(Nice, country\) stands in row 3 already"),
    (CAPITALS + "Rome,country, \n", "row 17, column answer: empty"),
    (CAPITALS + ",country,Italy\n", "row 17, column subject: empty"),
    (CAPITALS + "Rome,,Italy\n", "row 17, column relation: empty"),
    (CAPITALS + "Rome,country,Italy, Lazio\n", "row 17: more values than columns"),
    (CAPITALS + 'Rome,country,"Italy\nOslo,country,Norway\n', "row 17: .*quote left open"),
    (CAPITALS + "Rome,city,Italy\n", "row 17, column relation: unknown relation 'city'; mine.yaml has country"),
    ("subject,relation,answer,edit_answer\nLyon,country,France,France\n", "row 2, column edit_answer: the edit answer equals the true answer 'France'"),
    ("subject,relation,answer\nLyon,country,France\nNice,country,France\n", "row 2, column edit_answer: .*no other answer.*fill the column"),
    ("subject,relation,answer,distractors\nLyon,country,France,Peru|France\nIca,country,Peru,\n", "row 2, column distractors"),
    ("subject,relation,answer,distractors\nLyon,country,France,Peru|Peru\nIca,country,Peru,\n", "row 2, column distractors"),
    ("subject,relation,answer,paraphrases\nLyon,country,France,Lyon is in\nIca,country,Peru,\n", "row 2, column paraphrases: 'Lyon is in' must contain"),
    ("subject,relation,answer,role\nLyon,country,France,exampel\nIca,country,Peru,\n", "row 2, column role: 'exampel'"),
    ("subject,relation,answer,role\nLyon,country,France,example\n", "only examples"),
    (CAPITALS.encode() + "Nîmes,country,France\n".encode("latin-1"), r"row 17: not UTF-8 \(byte 0xee\)"),
    (b"\xef\xbb\xbf" + CAPITALS.encode() + b"\xeeX,country,France\n", "row 17: not UTF-8"),
    (CAPITALS.encode("utf-16"), "row 1: not UTF-8"),
])
def test_faulty_files_are_refused_with_the_place(own, text, message):
    with pytest.raises(FactsError, match=message):
        own(text)


def test_a_path_counts_from_the_working_directory_or_else_from_the_project(own, tmp_path, monkeypatch):
    mine, whole = own(CAPITALS), load("world")
    monkeypatch.chdir(tmp_path)
    assert load("mine.csv") == mine and load("data/world.csv") == whole
    (tmp_path / "data").mkdir()
    (tmp_path / "mine.csv").rename(tmp_path / "data" / "world.csv")
    (tmp_path / "mine.yaml").rename(tmp_path / "data" / "world.yaml")
    assert load("data/world.csv").items == mine.items  # what is here comes first


def test_unknown_sources_and_columns(own, tmp_path):
    with pytest.raises(FactsError, match="no facts at 'nothing': give one of athletes, world"):
        load("nothing")
    with pytest.raises(FactsError, match="no facts at"):
        load(tmp_path)
    with pytest.raises(FactsError, match="no column 'edit_answer_golf'.*subject, relation, answer"):
        own(CAPITALS, edit="edit_answer_golf")
    with pytest.raises(FactsError, match="no relation templates at"):
        own(CAPITALS, relations=tmp_path / "none.yaml")


@pytest.mark.parametrize("templates, message", [
    ("country:\n  cloze: 'This city is in'\n", "relation 'country': template 'This city is in' must contain {subject} once"),
    ("country:\n  cloze: '{subject} and {subject} are in'\n", "must contain {subject} once"),
    ("country:\n  cloze: '{subject} is in '\n", "with no space around"),
    ("country:\n  cloze: '{subject} is in'\n  question: Which country?\n", "'Which country\\?' must contain"),
    ("country:\n  cloze: '{subject} is in'\n  paraphrases: ['A city is in']\n", "'A city is in' must contain"),
    ("country:\n  cloze: '{subject} is in'\n  paraphrases: '{subject} lies in'\n", "paraphrases: expected a list"),
    ("country:\n  cloze: '{subject} is in'\n  options: [yes, no]\n", "put quotes around words such as yes"),
    ("country:\n  cloze: 3\n", "expected a list of texts"),
    ("country:\n  question: 'Where is {subject}?'\n", "needs at least a 'cloze'"),
    ("country:\n  cloze: '{subject} is in'\n  qestion: 'Where is {subject}?'\n", r"unknown fields \['qestion'\]; fields are cloze"),
    ("country:\n  cloze: '{subject} is in'\n  attributes:\n    flag:\n      cloze: '{subject} flies'\n", "attribute 'flag' needs 'cloze' and 'answers'"),
    ("- country\n", "expected a mapping"),
    ("country: {cloze: '{subject} is in'\n", "mine.yaml: not valid YAML"),
])
def test_faulty_templates_are_refused(own, templates, message):
    with pytest.raises(FactsError, match=message):
        own(CAPITALS, templates)


def test_attributes_follow_from_the_answer(athletes, own):
    league = next(a for a in athletes[0].relation.attributes if a.name == "league")
    assert [league.of(s) for s in ("football", "basketball", "baseball", "golf")] == ["NFL", "NBA", "MLB", "PGA"]
    with pytest.raises(FactsError, match="'league' has no value for 'chess'"):
        league.of("chess")


def test_one_edit_answer_for_all():
    athletes = facts.load("athletes")[:20]
    golfers = athletes.edited_to("golf")
    assert {f.edit for f in golfers} == {"golf"} and [f.key for f in golfers] == [f.key for f in athletes]
    for fact in golfers:
        assert fact.distractors[0] == "golf" and len(set(fact.distractors)) == 3 and fact.answer not in fact.distractors
    with pytest.raises(FactsError, match="the edit answer 'football' is the true answer"):
        athletes.edited_to("football")
