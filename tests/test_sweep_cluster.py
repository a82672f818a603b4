"""Sweeps on Ray: the same rows as on this machine, and a lost node costs no run."""

import json
import os
import signal
import sys
import threading

import pandas as pd
import pytest
from sweep_cases import FINISH, HANG, MARK, RESULT, command, entry, failure, is_alive, marks, notebook, sweep, sweep_file, wait_for

from helpers import provenance, store
from helpers.store import Present
from helpers.sweep import __main__ as command_line
from helpers.sweep import cluster, driver, plan

ROWS = 'import torch\nrun.record([{"x": float(x)} for x in torch.randn(8, generator=run.generator("x"))])'
GO = """import time
until = time.time() + 240
while not (pathlib.Path(run.params.notes).parent / "go").exists() and time.time() < until:
    time.sleep(0.1)"""


@pytest.fixture
def ray(monkeypatch):
    module = pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]', as make test-slow does")
    # on a shared machine tests at Ray's own low priority may never get their turn
    monkeypatch.setenv("RAY_worker_niceness", "0")
    return module


def left_by(task) -> dict[str, object]:
    """What a run left, without dates, durations and folders."""
    read = lambda name: json.loads((task.folder / name).read_text())
    found = {"files": sorted(path.name for path in task.folder.iterdir())}
    found["parameters"] = read("parameters.json") | {"out": ""}
    found["provenance"] = {name: value for name, value in read("provenance.json").items() if name != "started"}
    if "done.json" in found["files"]:
        found["done"] = {name: read("done.json")[name] for name in ("code", "uses", "held", "failed")}
    return found


@pytest.mark.slow
def test_the_same_rows_as_on_this_machine(tmp_path, ray):
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
        notebook(folder, "50_rows", ROWS, RESULT, 'run.check("a claim", 1, True)', FINISH)
        notebook(folder, "51_broken", ROWS, "1 / 0")
        sweep_file(folder, entry("50_rows", grid={"seed": [0, 1, 2]}, needs={"memory_gb": 0.1}), entry("51_broken"))
    here = sweep(folders[0] / "sweep.yaml", workers=1)
    process = command(folders[1] / "sweep.yaml", "--engine", "ray")
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 1 and "3 done, 1 failed" in said
    there = plan.load(folders[1] / "sweep.yaml", str(folders[1] / "out"))
    for one, other in zip(here.tasks, there):
        assert left_by(one) == left_by(other)
        pd.testing.assert_frame_equal(*(pd.read_parquet(task.folder / "rows.parquet") for task in (one, other)))
    assert failure(there[3]) == "ZeroDivisionError: division by zero"
    columns = [name for name in store.SCHEMA if name not in ("started", "machine")]
    tables = [store.read(folder / "out", notebooks=folder)[columns] for folder in folders]
    pd.testing.assert_frame_equal(*tables)
    assert len(tables[0]) == 6
    # what came back counts as finished here
    assert [driver.state(task, Present(folders[1])) for task in there] == ["finished"] * 3 + ["failed"]


@pytest.mark.slow
def test_runs_of_a_lost_node_are_made_on_another(tmp_path, ray):
    from ray.cluster_utils import Cluster

    (tmp_path / "notes").mkdir()
    notebook(tmp_path, "50_long", MARK, RESULT, GO, FINISH)
    file = sweep_file(tmp_path, entry("50_long", fixed={"notes": str(tmp_path / "notes")}, grid={"seed": [0, 1, 2]}))
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        lost, _ = [nodes.add_node(num_cpus=1) for _ in range(2)]
        nodes.wait_for_nodes()
        made = driver.Sweep(plan.load(file, str(tmp_path / "out")), cluster.Cluster(address=nodes.address), Present(tmp_path))
        run = threading.Thread(target=made.run)
        run.start()
        wait_for(lambda: len(marks(tmp_path / "notes")) == 2)
        nodes.remove_node(lost, allow_graceful=False)
        wait_for(lambda: sum(is_alive(pid) for _, pid in marks(tmp_path / "notes")) == 1, 60)
        (tmp_path / "go").touch()
        run.join(280)
        assert made.counts == {"done": 3}, made.failures
    finally:
        nodes.shutdown()
    begun = [seed for seed, _ in marks(tmp_path / "notes")]
    assert len(begun) == 4 and set(begun) == {0, 1, 2}
    assert sorted(store.read(tmp_path / "out", notebooks=tmp_path)["value"]) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_what_runs_and_keeps_what_has_finished(tmp_path, ray, ending):
    (tmp_path / "notes").mkdir()
    notebook(tmp_path, "50_long", MARK, RESULT, f"if run.seed:\n    {HANG.replace(chr(10), chr(10) + '    ')}", FINISH)
    file = sweep_file(tmp_path, entry("50_long", fixed={"notes": str(tmp_path / "notes")}, grid={"seed": [0, 1]}))
    process = command(file, "--engine", "ray")
    wait_for(lambda: list(tmp_path.glob("out/*/*/done.json")) and len(marks(tmp_path / "notes")) == 2)
    # Ctrl-C reaches the whole foreground group, a batch system the one process
    (os.killpg if ending == signal.SIGINT else os.kill)(process.pid, ending)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted: what has finished is stored" in said and "Traceback" not in said, said
    wait_for(lambda: not any(is_alive(pid) for _, pid in marks(tmp_path / "notes")), 60)
    assert store.read(tmp_path / "out", notebooks=tmp_path)["seed"].tolist() == [0, 0]


@pytest.mark.slow
def test_runs_that_no_node_has_room_for_are_refused_at_the_start(tmp_path, ray):
    notebook(tmp_path, "50_large", FINISH)
    process = command(sweep_file(tmp_path, entry("50_large", needs={"cpus": 4000, "memory_gb": 1})), "--engine", "ray")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "a run needs 4000 cores, 0 GPUs and 1.0 GB of memory, and no node" in said.splitlines()[-1]


NODES = [{"CPU": 0.0, "memory": 1e9}, {"CPU": 64.0, "memory": 100e9}, {"CPU": 8.0, "GPU": 2.0, "memory": 50e9}]


@pytest.mark.parametrize(("needs", "closest"), [
    ({"cpus": 64, "memory_gb": 100}, None),
    ({"cpus": 8, "gpus": 2}, None),
    ({"cpus": 65}, "64 cores, 0 GPUs and 100.0 GB of memory"),
    ({"cpus": 9, "gpus": 1}, "8 cores, 2 GPUs and 50.0 GB of memory"),
    ({"cpus": 4, "gpus": 4}, "8 cores, 2 GPUs and 50.0 GB of memory"),
    ({"cpus": 8, "gpus": 2, "memory_gb": 51}, "8 cores, 2 GPUs and 50.0 GB of memory"),
])
def test_room_is_that_of_one_node(needs, closest):
    wanted = [cluster._resources(plan.Needs(**needs))]
    if not closest:
        return cluster.require_room(wanted, NODES)
    with pytest.raises(plan.SweepError, match=f"no node of the Ray cluster is that large; the largest has {closest}"):
        cluster.require_room(wanted, NODES)


class Unreachable:
    """Ray where no cluster is."""

    def init(self, *a, **k):
        raise ConnectionError("Could not find any\nrunning Ray instance.")


@pytest.mark.parametrize(("address", "why"), [("auto", "Could not find any running Ray instance."), ("127.0.0.1:9", "refused"),
                                              ("ray://nowhere.invalid:10001", "")])
def test_a_cluster_that_does_not_answer_is_named_in_one_line(tmp_path, monkeypatch, capsys, address, why):
    notebook(tmp_path, "50_rows", FINISH)
    monkeypatch.setitem(sys.modules, "ray", Unreachable())
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert command_line.main([str(sweep_file(tmp_path, entry("50_rows"))), "--engine", "ray", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"no Ray cluster at {address}: ") and why in line


def test_inputs_that_do_not_come_with_the_project_are_refused(tmp_path, capsys):
    notebook(tmp_path, "50_rows", FINISH)
    for name in ("own.csv", "known.csv"):
        (tmp_path / name).touch()
    dry_run = lambda **given: command_line.main([str(sweep_file(tmp_path, entry("50_rows", fixed=given))), "--dry-run", "--engine", "ray",
                                                 "--out", str(tmp_path / "out")])
    root = provenance.project_root()
    outside = {"model": "/models/mine", "facts": "own.csv"}  # whether it is there or not, and relative to the notebook
    for name, value in [*outside.items(), ("facts", f"counterfact:{tmp_path / 'known.csv'}"), ("model", str(root / "runs" / "mine"))]:
        assert dry_run(**{name: value}) == 2
        assert f"these are not in it: {name} {value}. Copy them into the project" in capsys.readouterr().err
    for given in ({}, {"model": "tiny-llama3", "facts": "athletes"}, {"model": "some/model"}, {"facts": str(root / "data" / "world.csv")}):
        assert dry_run(**given) == 0
        assert "1 to do as the cluster has room" in capsys.readouterr().out
