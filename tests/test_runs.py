"""Runs: strict parameters, independent seeds, and what is written to disk."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from helpers import parameters, provenance, runs
from helpers.parameters import ParameterError
from helpers.progress import timed

CELL = '''
model: str = "tiny-llama3"  # a tiny name, a local path or a hub id
facts: str = "athletes"  # which facts
layers: list[int] = [1, 2]  # blocks to look at
rate: float = 0.1  # step size
profile: str = "quick"  # quick, standard or full
device: str = "cpu"  # auto, cpu, mps or cuda
'''
INJECTED = "# Parameters\n"
START = 'run = runs.start("02_example", globals())'


@pytest.fixture
def cells(tmp_path):
    """What a kernel has executed when the reader reaches the second code cell."""
    return ["", f"{CELL}out: str = {str(tmp_path / 'runs')!r}  # folder", START]


@pytest.fixture
def run(cells):
    return runs.start("02_example", {"In": cells})


def start_with(cells, *extra):
    return runs.start("02_example", {"In": [*cells[:2], *extra, START]})


# ---- parameters -------------------------------------------------------------------------------


def test_defaults_come_from_the_cell(run, capsys):
    assert run.params.model == "tiny-llama3"
    assert run.params.layers == [1, 2]
    assert run.params.seed == 0


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ('modle = "x"', "unknown parameter `modle`, did you mean `model`?"),
        ("zzz = 1", "unknown parameter `zzz`\nvalid parameters: profile, seed, out"),
        ("seed = 'one'", "parameter `seed`: input should be a valid integer (got 'one')"),
        ("seed = -1", "parameter `seed`: input should be greater than or equal to 0"),
        ("seed = True", "parameter `seed`"),
        ("model = 3", "parameter `model`: input should be a valid string (got 3)"),
        ("layers = [1, 'two']", "parameter `layers.1`"),
        ('profile = "fast"', "parameter `profile`: input should be 'smoke', 'quick', 'standard' or 'full' (got 'fast')"),
        ('device = "tpu"', "parameter `device`: a device is 'auto', 'cpu', 'mps', 'cuda'"),
        ('device = "cuda:99"', "`cuda:99` is not available here"),
        ('device = "spread"', "parameter `device`"),
        ('dtype = "int8"', "parameter `dtype`"),
        ('dtype = "float16"', "parameter `dtype`"),
    ],
)
def test_bad_parameter_is_refused_and_nothing_written(cells, tmp_path, injected, message):
    with pytest.raises(ParameterError) as error:
        start_with(cells, INJECTED + injected)
    assert message in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_injected_values_replace_defaults(cells):
    params = start_with(cells, INJECTED + "rate = 1\nseed = 7\nlayers = []\ndevice = 'cpu'").params
    assert (params.rate, params.seed, params.layers) == (1.0, 7, [])


def test_papermills_spelling_of_infinity(cells):
    assert start_with(cells, INJECTED + "rate = float('inf')").params.rate == float("inf")


def test_what_a_reader_does_later_does_not_trip_a_second_start(cells, run):
    later = ["model = load_model(model)", "mine = 3\nx: int = 4", "for seed in range(3):\n    pass", "1 +", START]
    again = runs.start("02_example", {"In": [*cells, *later]})
    assert again.params.model_dump() == run.params.model_dump()
    assert again.id == run.id


def test_an_edit_by_hand_counts(cells):
    assert start_with(cells, "seed = 5").seed == 5
    with pytest.raises(ParameterError, match="parameter `seed`"):
        start_with(cells, "seed = '5'")


def test_running_the_parameters_cell_again_forgets_older_injected_values(cells):
    assert start_with(cells, INJECTED + "seed = 5", cells[1]).seed == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rate: float = 'high'", "parameter `rate`"),
        ("rate: float = 2 ** x", "must be a literal value"),
        ("rate: torch.Tensor = 1", "type `torch.Tensor`"),
    ],
)
def test_a_reader_s_edit_of_the_parameters_cell_is_checked(cells, line, message):
    cells[1] = cells[1].replace("rate: float = 0.1", line)
    with pytest.raises(ParameterError, match=message):
        runs.start("02_example", {"In": cells})


def test_start_without_a_parameters_cell():
    with pytest.raises(ParameterError, match="run the first code cell"):
        runs.start("02_example", {"In": ["", START]})
    with pytest.raises(ParameterError, match="globals"):
        runs.start("02_example", {})


# ---- identity ---------------------------------------------------------------------------------


def test_run_id_depends_on_parameters_not_on_the_folder(cells, run, tmp_path):
    assert start_with(cells, INJECTED + f"out = {str(tmp_path / 'other')!r}").id == run.id
    assert start_with(cells, INJECTED + "seed = 1").id != run.id


def test_finished_only_after_finish_and_while_inputs_stay(run, tmp_path):
    data = tmp_path / "facts.csv"
    data.write_text("a,b\n")
    run.uses(data)
    assert runs.finished("02_example", run.params) is None
    run.finish()
    assert runs.finished("02_example", run.params) == run.folder
    data.write_text("a,c\n")
    assert runs.finished("02_example", run.params) is None
    data.unlink()
    assert runs.finished("02_example", run.params) is None


def test_finished_notices_changed_code(run, monkeypatch):
    run.finish()
    monkeypatch.setattr(provenance, "code_hash", lambda notebook: "other")
    assert runs.finished("02_example", run.params) is None
    assert runs.finished("02_example", run.params, same_code=False) == run.folder


def test_a_new_start_is_not_taken_for_the_old_finished_run(cells, run):
    run.record([{"a": 1}])
    run.figure(Figure(), "old")
    run.check("c", 1, True)
    run.finish()
    runs.start("02_example", {"In": cells})
    assert runs.finished("02_example", run.params) is None
    assert sorted(path.name for path in run.folder.iterdir()) == ["parameters.json", "provenance.json"]


# ---- seeds, device, profile -------------------------------------------------------------------


def test_generators_are_repeatable_and_independent(cells, run):
    def draw(source, purpose):
        return torch.rand(4, generator=source.generator(purpose))

    before = torch.random.get_rng_state()
    assert torch.equal(draw(run, "split"), draw(run, "split"))
    assert not torch.equal(draw(run, "split"), draw(run, "noise"))
    assert not torch.equal(draw(run, "split"), draw(start_with(cells, INJECTED + "seed = 1"), "split"))
    assert torch.equal(before, torch.random.get_rng_state())
    # a constant: the same seed has to mean the same numbers in the next release
    assert run.seed_for("split") == int(provenance.text_hash("0:split")[:8], 16)


def test_device_and_dtype(cells, run):
    assert run.device == torch.device("cpu")
    assert run.dtype == torch.float32
    assert start_with(cells, INJECTED + "dtype = 'bfloat16'").dtype == torch.bfloat16


def test_pick(cells):
    for profile, value in {"quick": 1, "standard": 2, "full": 3}.items():
        run = start_with(cells, INJECTED + f"profile = {profile!r}")
        assert run.pick(quick=1, standard=2, full=3) == run.pick(smoke=0, quick=1, standard=2, full=3) == value
    smoke = start_with(cells, INJECTED + "profile = 'smoke'")
    assert smoke.pick(quick=1, standard=2, full=3) == 1 and smoke.pick(smoke="", quick=1, standard=2, full=3) == ""


def test_a_block_is_timed():
    seconds = {}
    with timed(seconds, "slept"):
        time.sleep(0.02)
    assert 0.02 <= seconds["slept"] < 5


def test_progress_is_silent_when_headless(monkeypatch, capsys):
    monkeypatch.setenv(runs.HEADLESS_VARIABLE, "1")
    assert list(runs.progress(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(runs.HEADLESS_VARIABLE, "0")
    assert not runs.is_headless()
    monkeypatch.delenv(runs.HEADLESS_VARIABLE)
    monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
    assert not runs.is_headless()


# ---- what is written --------------------------------------------------------------------------


def test_rows_are_tidy_and_readable(run):
    run.record([{"layer": 0, "score": 0.5}, {"layer": 1, "score": 0.7}], method="probe")
    run.record(pd.DataFrame({"layer": [0], "seed": [9]}, index=[17]))
    run.record([])
    rows = pd.read_parquet(run.folder / "rows.parquet")
    assert list(rows.columns) == "run notebook model facts profile seed layer score method".split()
    assert rows["seed"].tolist() == [0, 0, 9]
    assert set(rows["model"]) == {"tiny-llama3"}
    pd.testing.assert_frame_equal(rows, run.rows)


def test_recording_the_same_rows_again_changes_nothing(run):
    for _ in range(2):
        run.record([{"layer": 0, "score": float("nan")}])
    assert len(run.rows) == 1


def test_a_failed_write_leaves_the_old_rows(run, monkeypatch):
    run.record([{"layer": 0}])
    with pytest.raises(Exception, match="layer"):
        run.record([{"layer": 1}, {"layer": "two"}])

    def torn(self, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", torn)
    with pytest.raises(OSError, match="disk full"):
        run.record([{"layer": 2}])
    assert pd.read_parquet(run.folder / "rows.parquet")["layer"].tolist() == [0]
    assert run.rows["layer"].tolist() == [0]
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".")]


def test_figures_are_saved_and_copied(cells, tmp_path):
    run = start_with(cells, INJECTED + f"figures = {str(tmp_path / 'figures')!r}")
    fig = Figure()
    fig.subplots().plot([0, 1])
    run.figure(fig, "line")
    saved = (run.folder / "figures" / "line.png").read_bytes()
    assert saved.startswith(b"\x89PNG")
    assert (tmp_path / "figures" / "02_example_line.png").read_bytes() == saved
    with pytest.raises(ValueError, match="name"):
        run.figure(fig, "../line")


def test_checks_are_shown_and_stored_and_never_raise(run, capsys):
    run.check("lookup comes first", 0.98765, True)
    run.check("<b> extraction </b>", np.float32(0.5), np.bool_(False))
    run.check("lookup comes first", [1, 2], False)
    run.finish()
    shown = capsys.readouterr().out
    assert "✓ holds: lookup comes first (observed: 0.9877)" in shown
    assert "✗ does not hold: lookup comes first (observed: [1, 2])" in shown
    assert "0 of 2 checks hold" in shown
    assert "<b> e" not in runs.Check("<b> e", 1, True)._repr_html_()
    stored = json.loads((run.folder / "checks.json").read_text())
    assert stored[0] == {"claim": "<b> extraction </b>", "observed": 0.5, "holds": False}
    done = json.loads((run.folder / "done.json").read_text())
    assert (done["held"], done["failed"]) == (0, 2)


def test_provenance(run, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a.bin").write_bytes(b"1")
    assert run.uses(tmp_path / "weights") == tmp_path / "weights"
    with pytest.raises(FileNotFoundError):
        run.uses(tmp_path / "nowhere")
    stored = json.loads((run.folder / "provenance.json").read_text())
    assert stored["packages"]["torch"] == torch.__version__
    assert stored["threads"] == torch.get_num_threads()
    assert (stored["device"], stored["dtype"]) == ("cpu", "float32")
    assert stored["uses"][str(tmp_path / "weights")] == provenance.content_hash(tmp_path / "weights")
    assert json.loads((run.folder / "parameters.json").read_text())["layers"] == [1, 2]


def test_a_file_that_appears_later_makes_the_run_stale(run, tmp_path):
    """As settings do that are searched after a first run with the defaults."""
    tuned = tmp_path / "lookup.yaml"
    assert run.uses(tuned, optional=True) == tuned
    run.finish()
    done = run.folder / "done.json"
    assert provenance.changed(json.loads(done.read_text())["uses"]) == [] and runs.is_current(run.folder, None)
    tuned.write_text("learning_rate: 0.001")
    assert provenance.changed(json.loads(done.read_text())["uses"]) == [str(tuned)] and not runs.is_current(run.folder, None)


def test_folder_hash_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = provenance.content_hash(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert provenance.content_hash(tmp_path) != first
    (tmp_path / "b").rename(tmp_path / "a")
    (tmp_path / ".hidden").write_text("an editor's")
    assert provenance.content_hash(tmp_path) == first


def test_git_state(tmp_path):
    assert provenance.git_state(tmp_path) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert provenance.git_state(tmp_path)["dirty"] is False
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "new").write_text("")
    assert provenance.git_state(tmp_path)["dirty"] is True
    assert provenance.git_state(tmp_path / "inner") is None


def test_import_does_not_load_torch():
    code = "import sys, helpers.runs; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    root = str(provenance.project_root())
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root})


def test_declared_names_needs_a_whole_parameters_cell():
    assert parameters.declared_names(CELL)[:2] == ["model", "facts"]
    assert parameters.declared_names(CELL + "x = 1") == []
    assert parameters.declared_names("x: int = 1") == []
