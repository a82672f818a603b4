"""Code in the documents runs as it stands, and every file that they link to is there."""

import re
import shlex
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from helpers import attacks, memory, metrics, parameters, presets, selection
from helpers.unlearning.training import Settings

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_extending(monkeypatch, capsys):
    monkeypatch.setattr(attacks, "ATTACKS", dict(attacks.ATTACKS))
    text = (ROOT / "docs/extending.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S))
    made = {"__name__": "extending"}
    exec(compile(code, "docs/extending.md", "exec"), made)
    model, parts, edit, rows = (made[name] for name in ("model", "parts", "edit", "rows"))
    power = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.")]
    assert len(power) == 9 and "\n".join(power) in text  # the table is what the code prints
    assert edit.norm > 0 and set(edit.values) == set(made["mask"].entries)
    with edit.applied(model):
        shouted = metrics.ask(model, parts.forget, "capitalised")
    assert rows[(rows["setting"] == "shout") & (rows["group"] == "forget")]["top_true"].tolist() == shouted["top_true"].tolist()


def test_teaching(monkeypatch, tmp_path, capsys):
    """A claim of one's own is judged on the rows that come with the project."""
    monkeypatch.chdir(ROOT)
    own = yaml.safe_load((ROOT / "data/claims.yaml").read_text())
    own["claims"] = [claim for claim in own["claims"] if claim["id"] == "mcq-random"]
    (tmp_path / "my_claims.yaml").write_text(yaml.safe_dump(own))
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/teaching.md").read_text(), flags=re.S).group(1)
    exec(compile(textwrap.dedent(code).replace("my_claims.yaml", str(tmp_path / "my_claims.yaml")), "docs/teaching.md", "exec"), {})
    said = capsys.readouterr().out
    assert "mcq-random" in said and "holds" in said


@pytest.mark.parametrize("name", ["qwen3-0.6b", "gemma-2-2b"])
def test_the_hardware_ladder(name):
    """The numbers of docs/real_models.md are those that are counted."""
    table = (ROOT / "docs/real_models.md").read_text()
    row = next(line for line in table.splitlines() if line.lower().startswith("|") and f"| {name} |" in line.lower())
    stated = [float(cell) for cell in row.strip("| ").split("|")[2:]]
    bare, how = memory.skeleton(presets.config(name)), Settings(chunk=4, recompute=True)
    lookup = memory.of_edit(bare, presets.likely_lookup(bare), how)
    everything = memory.of_edit(bare, selection.everything(bare), replace(how, masters=False))
    sizes = [memory.of_localization(bare, 16), lookup, everything]
    counted = [size.total / memory.GIB for size in sizes]
    counted.insert(2, lookup.work * how.steps / presets.RATE / 60)
    assert stated == pytest.approx(counted, abs=0.051)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    assert [link for link in linked if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_name_notebooks_and_their_parameters(document):
    for command in re.findall(r"papermill (?:notebooks/)?\d\d_[^`\n]+", document.read_text()):
        notebook, *rest = shlex.split(command)[1:]
        given = {rest[i + 1]: yaml.safe_load(rest[i + 2]) or "" for i, word in enumerate(rest) if word == "-p"}
        parameters.from_notebook(ROOT / "notebooks" / Path(notebook).name, given)
