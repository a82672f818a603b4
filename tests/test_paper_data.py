"""The counts of spec section 1 on the real files, where MU_PAPER_DATA names a folder that holds them; skipped elsewhere.

The folder has `sports.csv`, and copies of the CounterFact data sets as the hub lays them out, each in a folder called like it.
"""

import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest

from helpers import facts, sources
from helpers.facts import split

PAPER_DATA = os.environ.get("MU_PAPER_DATA", "")


def real(name: str) -> str:
    path = Path(PAPER_DATA, name)
    if not PAPER_DATA or not path.exists():
        pytest.skip(f"no {name}: set MU_PAPER_DATA to the folder that holds it")
    return str(path)


def test_counts_of_the_papers_athletes():
    """Spec section 1.1."""
    path = real("sports.csv")
    assert hashlib.md5(Path(path).read_bytes()).hexdigest() == sources.ATHLETES_MD5
    found = facts.load(f"paper-athletes:{path}")
    assert found.counts() == {"football": 583, "basketball": 490, "baseball": 486} and len(found) == 1559
    sizes = {"first-16": (16, 1234, 309), "first-64": (64, 1196, 299), "answer-basketball": (490, 855, 214),
             "answer-baseball": (486, 858, 215), "answer-football": (583, 780, 196)}
    for spec, size in sizes.items():
        parts = split(found, spec)
        assert (len(parts.forget), len(parts.retain_train), len(parts.retain_test)) == size
    edits = {n: Counter(fact.edit for fact in split(found, f"first-{n}").forget) for n in (16, 64)}
    assert edits == {16: {"basketball": 8, "baseball": 3, "football": 5}, 64: {"basketball": 25, "baseball": 23, "football": 16}}
    assert split(found, "first-16").forget.counts() == {"football": 7, "basketball": 5, "baseball": 4}
    assert split(found, "first-64").forget.counts() == {"football": 31, "basketball": 20, "baseball": 13}


@pytest.mark.parametrize("model, kept, retain", [("gemma-7b", 2189, (1648, 413)), ("gemma-2-9b", 2250, (1697, 425))])
def test_counts_of_the_papers_counterfact(model, kept, retain):
    """Spec section 1.3."""
    found = facts.load(f"paper-counterfact-{model}:{real('counterfact-with-gemma-probs')}")
    parts = split(found, "first-64")
    assert (len(found), len(parts.retain_train), len(parts.retain_test)) == (kept - 64, *retain)


@pytest.mark.parametrize("name", ["counterfact", "counterfact-tracing"])
def test_counts_of_counterfact(name):
    assert len(facts.load(f"{name}:{real(name)}")) == 21919
