"""The bundled facts, and a user's own file, for tests."""

from pathlib import Path

import pytest

from helpers.facts import load

SPORTS = {"football", "basketball", "baseball"}
PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "data" / "sports.csv"
needs_published = pytest.mark.skipif(not PUBLISHED.is_file(), reason="the paper's sports.csv is not here")
CAPITALS = "subject,relation,answer\n" + "".join(
    f"{city},country,{country}\n"
    for country, cities in {
        "France": ("Lyon", "Nice", "Lille"), "Japan": ("Osaka", "Kyoto", "Nagoya"), "Peru": ("Cusco", "Ica", "Tacna"),
        "Kenya": ("Nakuru", "Kisumu", "Thika"), "Chile": ("Arica", "Talca", "Iquique"),
    }.items()
    for city in cities
)
TEMPLATES = "country:\n  cloze: '{subject} is a city in'\n"


@pytest.fixture(scope="module")
def athletes():
    return load()


@pytest.fixture(scope="module")
def world():
    return load("world")


@pytest.fixture
def own(tmp_path):
    """Write a user's CSV, with templates beside it, and load it."""

    def write(text: str, templates: str | None = TEMPLATES, **options):
        path = tmp_path / "mine.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        if templates is not None:
            path.with_suffix(".yaml").write_text(templates)
        return load(path, **options)

    return write


def assert_sound(split, data):
    """Forget and retain partition the facts, the halves partition forget, retain is cut 80 / 20 in file order."""
    parts = (split.attack_train, split.attack_test, split.retain_train, split.retain_test)
    keys = [f.key for part in parts for f in part]
    assert len(keys) == len(set(keys)) == len(data)
    assert {f.key for f in split.attack_train} | {f.key for f in split.attack_test} == {f.key for f in split.forget}
    forgotten = {f.key for f in split.forget}
    rest = [f for f in data if f.key not in forgotten]
    assert [*split.retain_train, *split.retain_test] == rest
    assert len(split.retain_train) == int(0.8 * len(rest) + 1e-9)
