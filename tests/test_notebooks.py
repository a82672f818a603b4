"""Every notebook, executed through papermill; its result rows are asserted.

The quick profile on the default model, once a session; then, as a new user would, notebooks 00 to 02 on a
model saved to a folder and a CSV file of another relation; then wrong input.
"""

import csv
import json
import shutil
import subprocess
import sys

import notebook_cases as cases
import pandas as pd
import papermill
import pytest

from helpers import conventions, facts, notebooks, parameters, runs

FOLDER = cases.FOLDER
ALL = [path.stem for path in notebooks.select([], FOLDER)]
DEFAULT = facts.DATA / "models" / "tiny-gemma2"


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """Executes a notebook once; gives its rows and its checks by claim."""
    done, out = {}, tmp_path_factory.mktemp("quick")

    def execute(name: str) -> tuple[pd.DataFrame, dict]:
        if name not in done:
            done[name] = results(name, out)
        return done[name]

    return execute


def results(name: str, out, **given) -> tuple[pd.DataFrame, dict]:
    folder = cases.executed(name, out, **given)
    return pd.read_parquet(folder / "rows.parquet"), cases.checks(folder)


def holds(checks: dict, start: str) -> bool:
    return next(check["holds"] for claim, check in checks.items() if claim.startswith(start))


@pytest.mark.parametrize("name", ALL)
def test_form(name):
    assert conventions.problems(FOLDER / f"{name}.ipynb") == []


@pytest.mark.parametrize("name", ALL)
def test_committed_with_outputs(name):
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    assert any(cell.get("outputs") for cell in cells)
    assert not [o for cell in cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]


@pytest.mark.parametrize("name", ALL)
def test_committed_outputs_are_those_of_the_declared_parameters(name):
    """Outputs of older code, with other parameters or defaults, are noticed by the line that `runs.start` prints."""
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    start = next(cell for cell in cells if "runs.start(" in "".join(cell["source"]))
    printed = "".join(text for output in start["outputs"] if output.get("name") == "stdout" for text in output["text"])
    params = parameters.from_notebook(FOLDER / f"{name}.ipynb", {})
    in_use = [f"{key} {value}" for key, value in params if key not in runs.NOT_IDENTITY]
    assert printed.split("\n")[0] == " · ".join([f"{name}: run {runs.run_id(name, params)}", *in_use])


def test_quickstart(quick):
    rows, checks = quick("00_quickstart")
    forget = rows[rows["group"] == "forget"].groupby(["mask", "format"])["top_edit"].mean()
    assert forget["none", "one_shot"] <= 0.1
    # quick makes few steps: both edits take in the trained words
    assert forget["early", "one_shot"] >= 0.9 and forget["late", "one_shot"] >= 0.5
    # what the edits cost is measured beside what they do
    retain = rows[rows["group"] == "retain"].groupby(["mask", "format"])["top_true"].mean()
    assert retain["none", "one_shot"] >= 0.95 and {("early", "mcq"), ("late", "mcq")} <= set(retain.index)
    assert any(claim.startswith("neither edit collapses") for claim in checks)
    swap = rows[rows["measure"] == "swap"].pivot(index="layer", columns="swapped", values="p")
    # the first block's output at the whole name is all there is of it; after the last block nothing reads the name any more
    assert swap["whole name"].iloc[0] > 0.9 and (swap.iloc[-1] < 0.1).all()
    assert holds(checks, "outside the `with` block the model is unchanged")


def test_facts_and_models(quick):
    rows, checks = quick("01_facts_and_models")
    accuracy = rows.dropna(subset=["question"]).groupby("question")["right"].mean()
    assert accuracy["cloze"] >= 0.95 and accuracy["one-shot"] >= 0.95
    known = rows[rows["measure"] == "known facts"].iloc[0]
    assert known["value"] >= 0.9 * known["of"]
    assert holds(checks, "every answer is as frequent in one attack half")


def test_circuit(quick):
    rows, checks = quick("02_fact_lookup_circuit")
    probes = rows[rows["measure"] == "probe accuracy"].groupby(["position", "layer"])["accuracy"].mean()
    assert probes["last"].iloc[-1] >= 0.95
    chance = rows["chance"].mean()
    assert (probes["name, shuffled labels"] - chance).abs().max() <= 0.15
    patching = rows[(rows["measure"] == "activation patching") & (rows["site"] == "resid_pre")]
    last = patching[patching["position"] == "last"].set_index("layer")["score"]
    assert abs(last.loc[0]) < 1e-6 and last.iloc[-1] > 0.9
    assert holds(checks, "patched logit differences agree with TransformerLens")


def test_localization(quick):
    rows, checks = quick("03_localization")
    choice = rows[rows["measure"] == "choice"].set_index("choice")
    budget = choice.loc["fact lookup", "weights"]
    greedy = choice.drop(index=["fact lookup", "random MLPs"])["weights"]
    assert (greedy >= budget).all()
    areas = rows[rows["measure"] == "faithfulness area"].set_index("ranking")["area"]
    assert areas["attribution patching"] < areas["random"]
    assert holds(checks, "integrated gradients are complete")


def test_quick_rows_are_the_same_twice(tmp_path):
    tables = [results("00_quickstart", tmp_path / str(number))[0] for number in range(2)]
    pd.testing.assert_frame_equal(*tables)


@pytest.mark.parametrize("name", ["00_quickstart", "03_localization"])
def test_answers_that_no_probe_can_be_fitted_to(name, tmp_path):
    """Every country has two rivers or mountains here, so that none could be held out."""
    world = pd.read_csv(facts.DATA / "world.csv", keep_default_na=False)
    rare = world[world["relation"] == "natural_feature_country"].groupby("answer").head(2)
    rare[["subject", "relation", "answer"]].to_csv(tmp_path / "rare.csv", index=False)
    rows, _ = results(name, tmp_path, facts=str(tmp_path / "rare.csv"), profile="smoke")
    assert len(rows) and "probe accuracy" not in set(rows["measure"])


@pytest.fixture(scope="session")
def new_user(tmp_path_factory):
    """A model in a folder and a CSV of a relation of the user's own, with a template beside it."""
    home = tmp_path_factory.mktemp("user")
    shutil.copytree(DEFAULT, home / "my-model")
    chosen = [f for f in facts.load("world") if f.relation.name == "country_continent"]
    with open(home / "continents.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "relation", "answer"])
        writer.writerows([f.subject, "lies_in", f.answer] for f in chosen)
    (home / "continents.yaml").write_text("lies_in:\n  cloze: '{subject} is a country that lies in'\n  question: 'Which continent is {subject} part of?'\n")
    return home


@pytest.mark.parametrize("name", ["00_quickstart", "01_facts_and_models", "02_fact_lookup_circuit"])
def test_own_model_and_facts(name, new_user):
    rows, _ = results(name, new_user / "runs", model=str(new_user / "my-model"), facts=str(new_user / "continents.csv"))
    assert set(rows["facts"]) == {str(new_user / "continents.csv")}
    if name.startswith("01"):
        asked = rows.dropna(subset=["question"])
        assert set(asked["relation"]) == {"lies_in"}
        assert asked[asked["question"] == "cloze"]["right"].mean() >= 0.9
    if name.startswith("00"):
        shares = rows[rows["group"] == "forget"].groupby(["mask", "format"])["top_edit"].mean()
        assert shares["early", "one_shot"] >= shares["none", "one_shot"] + 0.3


@pytest.mark.parametrize(
    "given, said",
    [
        ({"modle": "x"}, "did you mean `model`"),
        ({"profile": "quickly"}, "quickly"),
        ({"seed": "seven"}, "seed"),
    ],
)
def test_wrong_parameters_stop_before_a_kernel_starts(given, said, tmp_path):
    with pytest.raises(parameters.ParameterError, match=said):
        notebooks.run([FOLDER / "02_fact_lookup_circuit.ipynb"], given | {"out": str(tmp_path)}, tmp_path / "copies")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, said",
    [
        ({"model": "tiny-lama3"}, "tiny-llama3"),
        ({"facts": "athlets"}, "athletes"),
        ({"model": "google/gemma-2-9b"}, "HF_HUB_OFFLINE"),
    ],
)
def test_wrong_model_or_facts_say_what_is_allowed(given, said, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=said):
        papermill.execute_notebook(
            FOLDER / "01_facts_and_models.ipynb", tmp_path / "out.ipynb", parameters={"profile": "quick", "out": str(tmp_path)} | given,
            kernel_name="python3", kernel_manager_class=notebooks.LocalKernel, cwd=FOLDER, progress_bar=False)


def test_misspelt_parameter_on_papermills_own_command_line(tmp_path):
    command = [sys.executable, "-m", "papermill", str(FOLDER / "00_quickstart.ipynb"), str(tmp_path / "o.ipynb"), "-p", "modle", "x", "--cwd", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "did you mean `model`" in done.stderr + done.stdout


def test_damaged_weights_are_named(tmp_path):
    shutil.copytree(DEFAULT, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    from helpers.models import ModelError, load_model

    with pytest.raises(ModelError, match="model.safetensors"):
        load_model(str(tmp_path / "broken"))
