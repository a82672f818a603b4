"""What makes a stored result another one: its notebook's code, the modules that code imports, its data and weights."""

import ast
import json
import os
import subprocess
import sys

import pytest
from sweep_cases import FINISH, PARAMETERS, notebook

from helpers import inputs, parameters, provenance, runs

PACKAGE = provenance.project_root() / "helpers"
LOADED = "import sys; print(*sorted(module.__file__ for name, module in sys.modules.items() if name.split('.')[0] == 'helpers'), sep='\\n')"


def names(files) -> set[str]:
    return {file.relative_to(PACKAGE).as_posix() for file in files}


def code_of(path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("stem", ["01_facts_and_models", "03_localization"])
def test_every_module_that_a_notebook_loads_is_found_in_its_text(stem):
    cells = code_of(provenance.project_root() / "notebooks" / f"{stem}.ipynb")
    imports = [ast.unparse(node) for cell in cells for node in ast.parse(cell).body if isinstance(node, ast.Import | ast.ImportFrom)]
    environment = {**os.environ, "PYTHONPATH": str(provenance.project_root())}
    command = [sys.executable, "-c", "\n".join([*imports, LOADED])]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split("\n")[:-1]
    found = {str(file) for file in provenance.modules(cells)}
    assert set(loaded) <= found
    # and those of another stage are not
    assert not {"sweep/driver.py", "pretrain.py", "unlearning/memit.py"} & names(provenance.modules(cells))


def test_modules_are_followed_through_one_another_and_into_functions():
    found = names(provenance.modules(["%matplotlib inline\nimport torch\ndef late():\n    from helpers import facts"]))
    # facts itself imports splits inside a function
    assert {"__init__.py", "facts.py", "splits.py"} <= found
    assert "tracing.py" not in found
    assert {"localization/__init__.py", "localization/probes.py"} <= names(provenance.modules(["import helpers.localization.probes as p"]))
    assert names(provenance.modules(["import numpy", "x = 1"])) == set()
    # what only IPython can read may import anything
    assert names(provenance.modules(["files = !ls"])) == names(PACKAGE.rglob("*.py"))


def test_no_helper_is_imported_in_a_way_that_reading_cannot_follow():
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level], file
        called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        by_name = {"import_module", "__import__"} & {getattr(name, "attr", getattr(name, "id", "")) for name in called}
        # packages of others only, listed in one place
        assert not by_name or file.name == "warm.py", file


@pytest.mark.parametrize(("module", "matters"), [("facts.py", True), ("splits.py", True), ("runs.py", True), ("pretrain.py", False),
                                                 ("plots/style.py", False), ("claims.py", False)])
def test_code_hash_changes_with_the_modules_it_imports_only(tmp_path, monkeypatch, module, matters):
    notebook(tmp_path, "50_facts", "from helpers import claims, plots\nfrom helpers.facts import load", FINISH)
    before, real = provenance.code_hash("50_facts", tmp_path), provenance.module_hash
    monkeypatch.setattr(provenance, "module_hash", lambda path: "changed" if path == PACKAGE / module else real(path))
    assert (provenance.code_hash("50_facts", tmp_path) != before) == matters
    # where the notebook is not at hand everything counts
    monkeypatch.undo()
    before = provenance.code_hash("99_nowhere")
    monkeypatch.setattr(provenance, "module_hash", lambda path: "changed" if path == PACKAGE / module else real(path))
    assert provenance.code_hash("99_nowhere") != before


@pytest.mark.parametrize(("module", "matters"), [("unlearning/memit.py", True), ("tracing.py", True), ("runs.py", False), ("attacks/latent.py", False),
                                                 ("progress.py", False)])
def test_package_hash_changes_with_the_package_and_what_it_imports_only(monkeypatch, module, matters):
    assert (PACKAGE / module).is_file()
    before, real = provenance.package_hash("unlearning"), provenance.module_hash
    monkeypatch.setattr(provenance, "module_hash", lambda path: "changed" if path == PACKAGE / module else real(path))
    assert (provenance.package_hash("unlearning") != before) == matters


CODE = '''"""Doc."""
import math  # of the standard library

def area(radius):  # a circle's
    """Of a circle,
    # in square units.
    """
    # not a sphere
    text = """kept # here
    and "here\"""
    return math.pi * radius**2, text, "# kept"
'''


def test_comments_and_docstrings_are_no_code():
    bare = provenance.essence(CODE)
    assert bare == '''import math

def area(radius):
    text = """kept # here
    and "here\"""
    return math.pi * radius**2, text, "# kept"
'''
    other = CODE.replace("Of a circle,", "Of a disc,\n    which is flat,").replace("  # a circle's", "").replace("# not a", "# nor a")
    assert other != CODE and provenance.essence(other) == bare
    for old, new in (("**2", "**3"), ("kept # here", "kept # there"), ('"# kept"', '"# gone"')):
        assert provenance.essence(CODE.replace(old, new)) != bare
    assert provenance.essence("files = !ls  # all") == "files = !ls  # all"
    assert provenance.essence("def f(): 'doc'; return 1") == "def f(): 'doc'; return 1"


def test_code_hash_sees_cells_and_not_prose_or_outputs(tmp_path, monkeypatch):
    path = notebook(tmp_path, "50_cells", "1 + 1", FINISH)
    before = provenance.code_hash("50_cells", tmp_path)
    cells = json.loads(path.read_text())
    cells["cells"][2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "2"}]
    cells["cells"].append({"cell_type": "markdown", "metadata": {}, "source": "prose", "id": "p"})
    path.write_text(json.dumps(cells))
    assert provenance.code_hash("50_cells", tmp_path) == before
    # a kernel finds it in its working directory
    monkeypatch.chdir(tmp_path)
    assert provenance.code_hash("50_cells") == before
    notebook(tmp_path, "50_cells", "1 + 2", FINISH)
    assert provenance.code_hash("50_cells") != before


def start(**given):
    declared = parameters.from_cell(PARAMETERS)
    return runs.Run("50_inputs", parameters.validate(declared, given))


def test_a_run_uses_the_model_and_facts_it_names(tmp_path):
    run = start(model="tiny-llama3", facts="world", out=str(tmp_path))
    assert {"data/world.csv", "data/relations.yaml", "data/models/tiny-llama3/model.safetensors",
            "data/models/tiny-llama3/tokenizer.json"} <= set(run.provenance["uses"])
    assert not any(path.endswith(("card.json", "README.md", ".png")) for path in run.provenance["uses"])


def test_a_second_model_is_an_input_too():
    declared = parameters.from_cell('profile: str = "quick"  # profile\ndissociating: str = "tiny-llama3-late"  # a second model')
    found = {path.relative_to(provenance.project_root()).as_posix() for path in inputs.files(parameters.validate(declared, {}))}
    assert "data/models/tiny-llama3-late/model.safetensors" in found


def test_a_run_on_own_model_and_facts_counts_until_either_changes(tmp_path):
    model, table = tmp_path / "model", tmp_path / "facts.csv"
    model.mkdir()
    for path in (model / "model.safetensors", model / "config.json", model / "README.md", table, table.with_suffix(".yaml")):
        path.write_text("one")
    given = {"model": str(model), "facts": str(table), "out": str(tmp_path / "out")}
    for path, matters in ((model / "model.safetensors", True), (model / "README.md", False), (table.with_suffix(".yaml"), True)):
        run = start(**given)
        run.finish()
        assert runs.finished("50_inputs", run.params) == run.folder
        path.write_text("two")
        assert (runs.finished("50_inputs", run.params) is None) == matters


def test_a_model_from_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    run = start(model="some/model", out=str(tmp_path / "out"))
    assert run.provenance["uses"] == {}
    commit = tmp_path / "models--some--model" / "refs" / "main"
    commit.parent.mkdir(parents=True)
    commit.write_text("0123abcd")
    # downloaded while the run was under way
    run.finish()
    assert json.loads((run.folder / "done.json").read_text())["uses"] == {str(commit): provenance.content_hash(commit)}


def test_inputs_of_nothing_known():
    declared = parameters.from_cell('profile: str = "quick"  # profile')
    assert inputs.files(parameters.validate(declared, {})) == []


def test_a_local_copy_of_a_source_and_text_of_ones_own_are_inputs(tmp_path):
    table, text = tmp_path / "counterfact.jsonl", tmp_path / "own.txt"
    table.write_text("{}")
    text.write_text("text")
    declared = parameters.from_cell('profile: str = "quick"  # profile\nfacts: str = ""  # facts\ntexts: str = ""  # texts')
    assert inputs.files(parameters.validate(declared, {"facts": f"counterfact:{table}", "texts": str(text)}))[::2] == [table, text]
    assert inputs.files(parameters.validate(declared, {"facts": "counterfact:nowhere", "texts": "pile"})) == []
