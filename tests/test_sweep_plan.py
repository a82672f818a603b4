"""Sweep files: what they expand to, what is refused before anything starts, estimates."""

import json
import shutil
import sys

import nbformat
import pytest
from sweep_cases import FINISH, RESULT, entry, notebook, sweep, sweep_file

from helpers import cores, parameters, provenance, runs, store
from helpers.store import Present
from helpers.sweep import __main__ as command_line
from helpers.sweep import driver, estimates, plan
from helpers.sweep.plan import SweepError
from helpers.sweep.pool import Pool, n_workers


@pytest.fixture
def folder(tmp_path):
    notebook(tmp_path, "50_plain", FINISH)
    return tmp_path


def finished_run(task, minutes, memory):
    """What a finished run of this code leaves, with other costs."""
    path = task.folder
    runs.Run(task.notebook.stem, parameters.from_notebook(task.notebook, task.given)).finish()
    code = provenance.code_hash(task.notebook.stem, task.notebook.parent)
    done = json.loads((path / "done.json").read_text()) | {"minutes": minutes, "memory_gb": memory, "code": code}
    provenance.write_json(path / "done.json", done)


def test_grid_and_list_are_multiplied(folder):
    grid = {"seed": [0, 1], "profile": ["quick", "full"]}
    file = sweep_file(folder, entry("50_plain", fixed={"notes": "n"}, grid=grid, list=[{"dtype": "float32"}, {"dtype": "bfloat16"}]))
    tasks = plan.load(file)
    assert len({task.folder for task in tasks}) == len(tasks) == 8
    assert {(t.params["seed"], t.params["profile"], t.params["dtype"]) for t in tasks} == {
        (seed, profile, dtype) for seed in (0, 1) for profile in ("quick", "full") for dtype in ("float32", "bfloat16")}
    assert {t.params["notes"] for t in tasks} == {"n"}


def test_a_run_is_what_it_is_in_a_notebook_and_a_repeated_one_is_made_once(folder):
    file = sweep_file(folder, entry("50_plain", grid={"seed": [0, 1]}), entry("50_plain", list=[{"seed": 1}, {"seed": 2}]))
    tasks = plan.load(file, "elsewhere")
    given = parameters.from_notebook(folder / "50_plain.ipynb", {"seed": 1, "out": "elsewhere"})
    assert [t.params["seed"] for t in tasks] == [0, 1, 2]
    assert tasks[1].folder == runs.folder("50_plain", given)


def test_notebooks_of_the_project_go_by_stem_or_number(tmp_path):
    tasks = plan.load(sweep_file(tmp_path, {"notebook": "02_fact_lookup_circuit"}, {"notebook": "03"}))
    assert [t.notebook.stem[:2] for t in tasks] == ["02", "03"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": {}}, "entry 2: unknown key `grids`, did you mean `grid`? (allowed: notebook, fixed, grid, list, needs)"),
        ({"needs": {"gpu": 1}}, "unknown key `needs.gpu`, did you mean `gpus`? (allowed: cpus, gpus, memory_gb)"),
        ({"needs": {"cpus": 0}}, "`needs.cpus`: input should be greater than or equal to 1 (got 0)"),
        ({"grid": {"sede": [1]}}, "unknown parameter `sede`, did you mean `seed`?"),
        ({"grid": {"seed": [0, "one"]}}, "parameter `seed`: input should be a valid integer (got 'one')"),
        ({"grid": {"seed": 3}}, "`grid.seed`: input should be a valid list (got 3)"),
        ({"grid": {"seed": []}}, "`grid.seed`: list should have at least 1 item"),
        ({"fixed": {"seed": 1}, "list": [{"seed": 2}]}, "`seed` is given in more than one of fixed, grid and list"),
        ({"fixed": {"out": "x"}}, "say where results go with --out"),
        ({"notebook": "nowhere.ipynb"}, "no notebook at"),
        ({"notebook": "99"}, "no notebook `99` in notebooks/: 00_quickstart"),
        ({"notebook": 2}, "`notebook`: input should be a valid string (got 2)"),
    ],
)
def test_what_is_wrong_is_named_before_anything_starts(folder, capsys, monkeypatch, change, message):
    monkeypatch.setattr(Pool, "start", lambda *a: pytest.fail("a run was started"))
    file = sweep_file(folder, entry("50_plain"), entry("50_plain") | change)
    assert command_line.main([str(file), "--out", str(folder / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_all_bad_entries_are_named_at_once(folder):
    file = sweep_file(folder, entry("50_plain", grid={"sede": [1]}), entry("50_plain"), entry("50_plain", fixed={"profile": "fast"}))
    with pytest.raises(SweepError, match=r"(?s)entry 1: unknown.*entry 3: parameter `profile`"):
        plan.load(file)


@pytest.mark.parametrize("text", ["", "notebook: x", "[1]", "- {", "- notebook: [a"])
def test_a_file_that_is_no_list_of_entries(tmp_path, text):
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(SweepError, match="sweep.yaml"):
        plan.load(file)
    with pytest.raises(SweepError, match="cannot be read"):
        plan.load(tmp_path / "other.yaml")


def test_a_key_given_twice_is_refused_with_its_line(folder, capsys):
    file = folder / "sweep.yaml"
    file.write_text("- notebook: 50_plain.ipynb\n  grid:\n    seed: [0]\n    profile: [quick]\n    seed: [1, 2]\n")
    assert command_line.main([str(file), "--out", str(folder / "out")]) == 2
    assert "sweep.yaml, line 5: `seed` is given already in line 3" in capsys.readouterr().err
    # the same key in two mappings, or one that replaces a merged one, is none given twice
    file.write_text("- &one {notebook: 50_plain.ipynb, fixed: {seed: 0}}\n- {<<: *one, fixed: {seed: 1}}\n")
    assert [task.params["seed"] for task in plan.load(file)] == [0, 1]


def test_a_file_that_is_not_utf8_is_refused(folder, capsys):
    file = folder / "sweep.yaml"
    file.write_bytes("- notebook: 50_plain.ipynb  # \xe4".encode("latin-1"))
    assert command_line.main([str(file), "--out", str(folder / "out")]) == 2
    assert capsys.readouterr().err == f"{file} cannot be read: it is not UTF-8 (byte 30)\n"


def test_a_broken_notebook_file_is_named(folder):
    (folder / "51_torn.ipynb").write_text('{"cells": [')
    notebook(folder, "52_bare", FINISH)
    bare = nbformat.read(folder / "52_bare.ipynb", as_version=4)
    bare.cells[0].metadata = {}
    nbformat.write(bare, folder / "52_bare.ipynb")
    with pytest.raises(SweepError, match=r"(?s)51_torn.ipynb cannot be read.*52_bare.ipynb has no cell tagged `parameters`"):
        plan.load(sweep_file(folder, entry("51_torn"), entry("52_bare")))


def test_sweeps_of_the_repository_fit_the_notebooks():
    files = sorted((provenance.project_root() / "sweeps").glob("*.yaml"))
    assert files and all(plan.load(file) for file in files)


def test_estimates_are_those_of_the_most_similar_stored_runs(folder):
    file = sweep_file(folder, entry("50_plain", grid={"seed": [0, 1, 2], "profile": ["quick", "full"]}))
    tasks = plan.load(file, str(folder / "out"))
    costs = {("quick", 0): (2.0, 1.0), ("quick", 1): (4.0, 3.0), ("full", 0): (60.0, 9.0)}
    for task in tasks:
        if made := costs.get((task.params["profile"], task.params["seed"])):
            finished_run(task, *made)
    states = [driver.state(task, Present(folder)) for task in tasks]
    assert states.count("finished") == 3 and states.count("new") == 3
    table = estimates.table(tasks, states, [folder / "out"]).assign(todo=[state == "new" for state in states])
    costs = table.groupby("profile")[["minutes", "memory_gb"]].agg(["min", "max"])
    assert costs.loc["quick"].tolist() == [3.0, 3.0, 3.0, 3.0] and costs.loc["full"].tolist() == [60.0, 60.0, 9.0, 9.0]
    # to do: seed 2 of quick, seeds 1 and 2 of full
    assert estimates.summary(table, 2) == "6 runs (3 finished, 3 new), 3 to do with 2 side by side; about 62 min; up to 18.0 GB of memory"
    # nobody knows beforehand how many runs a cluster makes at once
    assert estimates.summary(table, None).endswith("3 to do as the cluster has room; about 2 h 3 min one after another; up to 9.0 GB of memory a run")


def test_estimates_come_from_packed_runs_too(folder, capsys):
    file = sweep_file(folder, entry("50_plain", grid={"seed": [0, 1, 2], "profile": ["quick", "full"]}))
    notebook(folder, "50_plain", RESULT, FINISH)
    for task in sweep(file).tasks[:3]:
        done = json.loads((task.folder / "done.json").read_text())
        provenance.write_json(task.folder / "done.json", done | {"minutes": 7.0, "memory_gb": 1.5})
    for task in plan.load(file, str(folder / "out"))[3:]:
        shutil.rmtree(task.folder)
    (folder / "kept").mkdir()
    store.pack([folder / "out"], folder / "kept" / "three.parquet", folder)
    shutil.rmtree(folder / "out")
    notebook(folder, "50_plain", RESULT, "1 + 1", FINISH)  # other code
    options = [str(file), "--dry-run", "--out", str(folder / "out"), "--workers", "3", "--rows", str(folder / "kept")]
    assert command_line.main(options) == 0
    said = capsys.readouterr().out
    assert said.count("packed, stale") == 4  # thrice in the table
    assert "6 runs (3 packed, stale, 3 new), 3 to do with 3 side by side; about 7 min; up to 4.5 GB of memory" in said


def test_dry_run_prints_the_table_and_leaves_nothing(folder, capsys):
    file = sweep_file(folder, entry("50_plain", grid={"seed": [3, 4]}, needs={"memory_gb": 2.5}))
    assert command_line.main([str(file), "--dry-run", "--out", str(folder / "out"), "--workers", "3"]) == 0
    said = capsys.readouterr().out
    assert said.count("50_plain   new") == 2 and "2.5" in said
    assert "2 to do with 3 side by side; up to 5.0 GB of memory; no estimate of time for 2" in said
    assert not (folder / "out").exists()


def test_without_ray_the_way_to_get_it_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command_line.main([str(sweep_file(folder, entry("50_plain"))), "--engine", "ray", "--out", str(folder / "out")]) == 2
    assert "pip install -e '.[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "words"), [(45, "45 s"), (720, "12 min"), (12000, "3 h 20 min")])
def test_duration(seconds, words):
    assert estimates.duration(seconds) == words


def test_pool_size_is_bounded_by_memory_gpus_and_cores():
    assert n_workers(0, 1, 1e9) == 1
    assert n_workers(3, 1, 1e-6) == 3
    assert n_workers(0, 1, 1e-6) == cores.n_cores()
    assert n_workers(0, cores.n_cores(), 1e-6) == 1
    assert 1 <= n_workers(0, 1, float("nan")) <= cores.n_cores()
