"""Code in the documents runs as it stands, and every file that they link to is there."""

import re
from pathlib import Path

import pytest

from helpers import attacks, metrics

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_extending(monkeypatch):
    monkeypatch.setattr(attacks, "ATTACKS", dict(attacks.ATTACKS))
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/extending.md").read_text(), flags=re.M | re.S))
    made = {"__name__": "extending"}
    exec(compile(code, "docs/extending.md", "exec"), made)
    model, parts, edit, rows = (made[name] for name in ("model", "parts", "edit", "rows"))
    assert edit.norm > 0 and set(edit.values) == set(made["mask"].entries)
    with edit.applied(model):
        shouted = metrics.ask(model, parts.forget, "capitalised")
    assert rows[(rows["setting"] == "shout") & (rows["group"] == "forget")]["top_true"].tolist() == shouted["top_true"].tolist()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    assert [link for link in linked if not (document.parent / link).exists()] == []
