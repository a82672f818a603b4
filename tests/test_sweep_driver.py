"""Nothing twice, nothing lost: interrupted, repeated and simultaneous sweeps on one store."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from sweep_cases import FINISH, MARK, RESULT, command, entry, is_alive, marks, notebook, sweep, sweep_file, wait_for

from helpers import provenance, store
from helpers.store import Present
from helpers.sweep import driver, plan
from helpers.sweep.pool import WARM


class Scripted:
    """An engine that starts nothing: runs end at once, with the error that is written for them, else finished."""

    side_by_side = free = 2

    def __init__(self, errors=None):
        self.errors, self.started = errors or {}, []

    def start(self, task):
        self.started.append(task)

    def wait(self, seconds):
        ended, self.started = self.started, []
        for task in ended:
            if task.params["seed"] not in self.errors:
                provenance.write_json(task.folder / "done.json", {"code": "c", "uses": {}})
        return [(task, self.errors.get(task.params["seed"], "")) for task in ended]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def scripted(file, errors=None, redo=(), packed=()):
    made = driver.Sweep(plan.load(file, str(file.parent / "out")), Scripted(errors), Present(file.parent), redo, dict(packed))
    made.run()
    return made


def dates(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("done.json")}


def test_finished_runs_are_skipped_and_failed_ones_retried_on_request(tmp_path, notes):
    notebook(tmp_path, "50_once", MARK, RESULT, "if run.seed == 1:\n    open(pathlib.Path(run.params.notes).parent / 'mended')", FINISH)
    file = sweep_file(tmp_path, entry("50_once", fixed={"notes": str(notes)}, grid={"seed": [0, 1, 2]}))
    assert sweep(file).counts == {"done": 2, "failed": 1}
    before = dates(tmp_path)
    assert sweep(file).counts == {"finished before": 2, "failed before": 1}
    (tmp_path / "mended").touch()
    made = sweep(file, ("failed",))
    assert made.counts == {"finished before": 2, "done": 1}
    assert [seed for seed, _ in marks(notes)] == [0, 1, 1, 2]
    assert before.items() < dates(tmp_path).items()
    assert not list(tmp_path.rglob("failed.json"))
    assert store.read(tmp_path / "out", notebooks=tmp_path)["value"].tolist() == [v for t in sorted(made.tasks, key=lambda t: t.run)
                                                                                 for v in (t.params["seed"], t.params["seed"] + 0.5)]


def test_rows_of_older_code_stay_flagged_until_newer_ones_are_there(tmp_path):
    file = sweep_file(tmp_path, entry("50_rows"))
    read = lambda: store.read(tmp_path / "out", notebooks=tmp_path)[["value", "stale"]].values.tolist()
    notebook(tmp_path, "50_rows", RESULT, FINISH)
    sweep(file)
    assert read() == [[0.0, False], [0.5, False]]
    notebook(tmp_path, "50_rows", RESULT.replace("[run.seed,", "[7,"), "1 / 0", FINISH)
    assert read() == [[0.0, True], [0.5, True]]
    assert sweep(file, ()).counts == {"stale before": 1}
    assert sweep(file).counts == {"failed": 1}
    assert read() == [[0.0, True], [0.5, True]]
    notebook(tmp_path, "50_rows", RESULT.replace("[run.seed,", "[7,"), FINISH)
    # it failed with other code, so it is tried again unasked
    assert sweep(file).counts == {"done": 1}
    assert read() == [[7.0, False], [0.5, False]]
    assert len(list((tmp_path / "out" / "50_rows").iterdir())) == 1


def test_runs_whose_rows_are_kept_elsewhere_are_not_made_again(tmp_path):
    notebook(tmp_path, "50_rows", RESULT, FINISH)
    sweep(sweep_file(tmp_path, entry("50_rows", grid={"seed": [0, 1]})))
    (tmp_path / "kept").mkdir()
    store.pack([tmp_path / "out"], tmp_path / "kept" / "two.parquet", tmp_path)
    shutil.rmtree(tmp_path / "out")
    file = sweep_file(tmp_path, entry("50_rows", grid={"seed": [0, 1, 2]}))
    kept = lambda: store.packed(tmp_path / "kept", notebooks=tmp_path)
    assert set(kept().values()) == {False} and store.packed() == {}
    assert scripted(file, packed=kept()).counts == {"packed before": 2, "done": 1}
    shutil.rmtree(tmp_path / "out")
    notebook(tmp_path, "50_rows", RESULT.replace("[run.seed,", "[7,"), FINISH)  # other code
    assert set(kept().values()) == {True}
    assert scripted(file, redo=("stale",), packed=kept()).counts == {"packed, stale before": 2, "done": 1}
    # nor are those that the store has by older code
    for task in plan.load(file, str(tmp_path / "out"))[:2]:
        provenance.write_json(task.folder / "done.json", {"code": "older", "uses": {}})
    assert scripted(file, redo=("stale", "failed"), packed=kept()).counts == {"packed, stale before": 2, "done": 1}
    assert scripted(file, redo=("stale",)).counts == {"done": 3}
    assert scripted(file, redo=("stale", "packed, stale"), packed=kept()).counts == {"done": 3}
    with pytest.raises(store.StoreError, match="no runs at"):
        store.packed(tmp_path / "nowhere.parquet")


def test_what_cannot_be_read_is_made_again(tmp_path):
    notebook(tmp_path, "50_rows", RESULT, FINISH)
    file = sweep_file(tmp_path, entry("50_rows", grid={"seed": [0, 1, 2]}))
    tasks = sweep(file).tasks
    (tasks[0].folder / "results.parquet").write_bytes(b"")
    (tasks[1].folder / "provenance.json").write_bytes(b"{}")
    assert [driver.state(task, Present(tmp_path)) for task in tasks] == ["unreadable", "unreadable", "finished"]
    assert sweep(file, ()).counts == {"done": 2, "finished before": 1}
    assert len(store.read(tmp_path / "out", notebooks=tmp_path)) == 6


@pytest.fixture
def temporary(monkeypatch):
    """The folder for temporary files, short enough for sockets."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="k"))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


# with a child of the kernel in a session of its own, which no signal to the kernel's group reaches
HANG_WITH_CHILD = """import subprocess, sys, time
if run.seed > 0 and not (pathlib.Path(run.params.notes).parent / "go").exists():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    pathlib.Path(run.params.notes, "..", "children", f"{run.seed}-{child.pid}").touch()
    time.sleep(600)"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_or_interrupted_sweep_leaves_nothing_running_and_is_resumed(tmp_path, notes, temporary, ending):
    (tmp_path / "children").mkdir()
    notebook(tmp_path, "50_long", MARK, RESULT, HANG_WITH_CHILD, FINISH)
    file = sweep_file(tmp_path, entry("50_long", fixed={"notes": str(notes)}, grid={"seed": [0, 1, 2]}))
    process = command(file, "--workers", "1")
    wait_for(lambda: 1 in dict(marks(tmp_path / "children")))
    # Ctrl-C reaches the whole foreground group, kill -9 the one process
    (os.killpg if ending == signal.SIGINT else os.kill)(process.pid, ending)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (-ending if ending == signal.SIGKILL else 130), said
    hung = [dict(marks(folder))[1] for folder in (notes, tmp_path / "children")]
    wait_for(lambda: not any(map(is_alive, hung)), 30)
    if ending != signal.SIGKILL:
        assert "Traceback" not in said and not list(temporary.iterdir())
    states = store.runs(tmp_path / "out", tmp_path)["state"].tolist()
    assert sorted(states) == ["finished", "unfinished"]
    # what was cut off is not read, what had finished is
    assert store.read(tmp_path / "out", notebooks=tmp_path)["seed"].tolist() == [0, 0]
    before = dates(tmp_path)
    (tmp_path / "go").touch()
    assert sweep(file).counts == {"finished before": 1, "done": 2}
    assert before.items() < dates(tmp_path).items()
    assert [seed for seed, _ in marks(notes)] == [0, 1, 1, 2]


@pytest.mark.skipif(not WARM, reason="nothing is imported beforehand here")
def test_an_interrupt_while_packages_are_imported_for_all_runs_says_so_and_no_more(tmp_path, notes, temporary):
    notebook(tmp_path, "50_long", MARK, FINISH)
    process = command(sweep_file(tmp_path, entry("50_long", fixed={"notes": str(notes)})))
    warm = lambda: [child for child in psutil.Process(process.pid).children() if "forkserver" in " ".join(child.cmdline())]
    wait_for(lambda: any("torch" in mapped.path for child in warm() for mapped in child.memory_maps()))
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert not marks(notes) and not list(temporary.iterdir())


def test_two_sweeps_at_once_share_the_work(tmp_path, notes):
    notebook(tmp_path, "50_shared", MARK, RESULT, "import time\ntime.sleep(0.5)", FINISH)
    file = sweep_file(tmp_path, entry("50_shared", fixed={"notes": str(notes)}, grid={"seed": list(range(8))}))
    both = [command(file, "--workers", "1") for _ in range(2)]
    said = [process.communicate(timeout=280)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [seed for seed, _ in marks(notes)] == list(range(8))
    rows = store.read(tmp_path / "out", notebooks=tmp_path)
    assert sorted(rows["value"]) == sorted(x for seed in range(8) for x in (seed, seed + 0.5))
    summaries = [dict(reversed(part.split(" ", 1)) for part in text.splitlines()[-1].split(", ")) for text in said]
    assert sum(int(summary.get("done", 0)) for summary in summaries) == 8
    assert all(sum(map(int, summary.values())) == 8 for summary in summaries)


def test_a_run_that_another_sweep_holds_is_waited_for(tmp_path, monkeypatch):
    notebook(tmp_path, "50_held", FINISH)
    file = sweep_file(tmp_path, entry("50_held", grid={"seed": [0, 1]}))
    held = plan.load(file, str(tmp_path / "out"))[0]
    lock = FileLock(driver._lock_file(held))
    lock.acquire()
    order, real = [], Scripted.wait

    def wait(self, seconds):
        order.extend(task.params["seed"] for task in self.started)
        if order == [1] and not self.started:
            lock.release()
        return real(self, seconds)

    monkeypatch.setattr(Scripted, "wait", wait)
    assert scripted(file).counts == {"done": 2}
    assert order == [1, 0]


FULL = """import resource, sys
from pathlib import Path
from test_sweep_driver import scripted
resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))  # bytes a file: room for a done.json of Scripted, none for a failed.json
made = scripted(Path(sys.argv[1]), {1: "KernelDied"})
print(dict(made.counts))
print(made.failures[0][1])"""


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX")
def test_a_disk_too_full_to_note_a_failure_stops_nothing(tmp_path):
    """A driver of its own, which the system lets write no more."""
    notebook(tmp_path, "50_full", FINISH)
    file = sweep_file(tmp_path, entry("50_full", grid={"seed": [0, 1, 2]}))
    found = [str(Path(__file__).parent), str(provenance.project_root())]
    driven = subprocess.run([sys.executable, "-c", FULL, str(file)], env={**os.environ, "PYTHONPATH": os.pathsep.join(found)},
                            capture_output=True, text=True, timeout=240)
    assert driven.returncode == 0, driven.stderr
    counts, why = driven.stdout.splitlines()
    assert counts == "{'done': 2, 'failed': 1}"
    assert why.startswith("KernelDied (and it could not be noted: [Errno 27] File too large")
    tasks = plan.load(file, str(tmp_path / "out"))
    assert [(task.folder / "done.json").exists() for task in tasks] == [True, False, True]
    assert not any(tasks[1].folder.iterdir())  # no torn file
    assert driver.state(tasks[1], Present(tmp_path)) == "new"


def test_a_store_that_cannot_be_written_fails_each_run(tmp_path):
    notebook(tmp_path, "50_nowhere", FINISH)
    (tmp_path / "out").write_text("a file where the folder should be")
    made = scripted(sweep_file(tmp_path, entry("50_nowhere", grid={"seed": [0, 1]})))
    assert made.counts == {"failed": 2}
    assert all("out" in error for _, error in made.failures)


def test_an_error_after_the_last_cell_is_no_finished_run(tmp_path):
    notebook(tmp_path, "50_late", FINISH)
    file = sweep_file(tmp_path, entry("50_late"))
    (task,) = plan.load(file, str(tmp_path / "out"))

    class Late(Scripted):
        def start(self, task):
            super().start(task)
            provenance.write_json(task.folder / "done.json", {"code": "c", "uses": {}})

    made = driver.Sweep([task], Late({0: "OSError: disk full"}), Present(tmp_path))
    made.run()
    assert driver.state(task, Present(tmp_path)) == "failed"
    assert json.loads((task.folder / "failed.json").read_text())["error"] == "OSError: disk full"


def test_progress_is_shown_where_somebody_watches_and_nowhere_else(tmp_path, capsys, monkeypatch):
    notebook(tmp_path, "50_shown", FINISH)
    file = sweep_file(tmp_path, entry("50_shown", grid={"seed": [0, 1, 2]}))
    for headless, shown in (("1", False), ("0", True)):
        monkeypatch.setenv("MU_HEADLESS", headless)
        scripted(file, {0: "broken"}, ("stale", "failed"))
        said = capsys.readouterr().err
        assert ("0 running, 2 done, 1 failed, 0 to do" in said) == shown
        assert bool(said) == shown
