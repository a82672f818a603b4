"""The pool: warm and cold kernels do the same, have their threads and GPUs, and end in whatever way they must."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess

import pandas as pd
import pytest
from sweep_cases import FINISH, HANG, MARK, entry, executed, failure, is_alive, marks, notebook, sweep, sweep_file, wait_for

from helpers import provenance, store
from helpers.sweep import plan
from helpers.sweep.interrupts import held_back
from helpers.sweep.pool import WARM, Pool, gpus

SEEN = """import os, time, torch
run.record([{"threads": torch.get_num_threads(), "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "cwd": os.getcwd(), "pid": os.getpid()}])
until = time.time() + 120
while len(os.listdir(run.params.notes)) < 2 and time.time() < until:
    time.sleep(0.05)"""
COMPUTED = """import torch
import matplotlib.pyplot as plt
values = torch.randn(64, 64, generator=run.generator("values"))
run.record([{"value": float(x)} for x in torch.linalg.svdvals(values @ values)])
plt.plot([1, 2]);"""


# run in a new interpreter: after torch, before all else that is imported for runs to come
SPY = """import os, sys, threading, torch
for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, lambda *a, **k: sys.exit("a GPU was asked for"))
from helpers.sweep import warm
print([package for package in warm.PACKAGES if package not in sys.modules])
print(threading.active_count(), sorted(name for name in sys.modules if name.split(".")[0] == "helpers"))"""


@pytest.fixture(autouse=True)
def interruptible():
    """What a shell starts in the background ignores Ctrl-C, the tests as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def test_runs_side_by_side_have_kernels_threads_and_gpus_of_their_own(tmp_path, notes):
    notebook(tmp_path, "50_seen", MARK, SEEN, FINISH)
    made = sweep(sweep_file(tmp_path, entry("50_seen", fixed={"notes": str(notes)}, grid={"seed": [0, 1]})), threads=1, gpus=["6", "7"])
    rows = pd.concat([pd.read_parquet(task.folder / "rows.parquet") for task in made.tasks])
    # neither went on before both had left their mark
    assert len(marks(notes)) == 2 and made.counts == {"done": 2}
    assert rows["pid"].nunique() == 2 and set(rows["gpu"]) == {"6", "7"}
    assert set(rows["threads"]) == {1} and set(rows["cwd"]) == {str(tmp_path)}
    wait_for(lambda: not any(is_alive(pid) for _, pid in marks(notes)), 30)


def test_what_is_imported_for_all_runs_can_be_forked():
    environment = {**os.environ, "PYTHONPATH": str(provenance.project_root())}
    done = subprocess.run([sys.executable, "-c", SPY], capture_output=True, text=True, env=environment)
    # all there, nothing of ours that a run should see as it is then, no thread, no GPU: neither would survive
    assert done.stdout.splitlines() == ["[]", "1 ['helpers', 'helpers.sweep', 'helpers.sweep.warm']"], done.stderr


@pytest.mark.skipif(not WARM, reason="kernels are not forked here")
def test_a_forked_kernel_does_what_a_new_one_does(tmp_path):
    notebook(tmp_path, "50_computed", COMPUTED, FINISH)
    found = []
    for warm in (True, False):
        (task,) = sweep(sweep_file(tmp_path, entry("50_computed")), ("finished",), warm=warm).tasks
        shown = executed(task).cells[-2].outputs
        assert "image/png" in shown[-1].data
        code = store.runs(tmp_path / "out", tmp_path)["code"].tolist()
        found.append((pd.read_parquet(task.folder / "rows.parquet"), [output.output_type for output in shown], code))
    pd.testing.assert_frame_equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_what_goes_wrong_in_a_run_is_kept_and_the_others_go_on(tmp_path, notes):
    kill = "import os, signal, time\nos.kill(os.{}(), signal.SIGKILL)\ntime.sleep(600)"
    bodies = {"50_good": [FINISH], "51_broken": ["1 / 0"], "52_killed": [kill.format("getpid")], "53_orphaned": [kill.format("getppid")],
              "54_unfinished": ["1 + 1"]}
    for stem, body in bodies.items():
        notebook(tmp_path, stem, MARK, *body)
    file = sweep_file(tmp_path, *(entry(stem, fixed={"notes": str(notes)}) for stem in bodies))
    made = sweep(file)
    assert made.counts == {"done": 1, "failed": 4}
    said = {task.notebook.stem: failure(task) for task, _ in made.failures}
    assert said["51_broken"] == "ZeroDivisionError: division by zero"
    assert "DeadKernelError" in said["52_killed"]
    if WARM:  # the parent of a forked kernel is the process that executes its notebook
        assert said["53_orphaned"] == "the process of the run was killed by SIGKILL"
    assert "no run.finish()" in said["54_unfinished"]
    broken = next(task for task in made.tasks if task.notebook.stem == "51_broken")
    assert executed(broken).cells[-1].outputs[-1].ename == "ZeroDivisionError"
    assert store.runs(tmp_path / "out", tmp_path)["state"].tolist() == ["finished", "failed", "failed", "failed", "failed"]
    wait_for(lambda: not any(is_alive(pid) for _, pid in marks(notes)), 30)


def test_a_hung_kernel_is_stopped_after_its_time(tmp_path, notes):
    notebook(tmp_path, "50_hung", MARK, HANG, FINISH)
    file = sweep_file(tmp_path, entry("50_hung", fixed={"notes": str(notes)}))
    for minutes in (0.25, 1, 4):
        made = sweep(file, ("failed",), minutes=minutes)
        if marks(notes):  # a busy machine may need longer to get so far
            break
    ((task, error),) = made.failures
    assert error == failure(task) == f"stopped after {minutes:g} minutes, the time limit of a run"
    # the notebook shows where it hung
    assert [cell.metadata.papermill.status for cell in executed(task).cells[-3:]] == ["completed", "running", "pending"]
    ((_, pid),) = marks(notes)
    wait_for(lambda: not is_alive(pid), 30)


def test_a_full_disk_fails_the_runs_that_need_more_of_it(tmp_path):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))"
    rows = "import numpy as np\nrun.record([{'x': float(x)} for x in np.random.default_rng(0).random(10 ** (3 + run.seed))])"
    notebook(tmp_path, "50_rows", "run.record([{'x': 1.0}])", limit, rows, FINISH)
    made = sweep(sweep_file(tmp_path, entry("50_rows", grid={"seed": [0, 1]})))
    assert made.counts == {"done": 1, "failed": 1}
    small, large = (pd.read_parquet(task.folder / "rows.parquet") for task in made.tasks)
    assert len(small) == 1001
    # what was there before the disk was full is whole
    assert large["x"].tolist() == [1.0]
    assert "File too large" in failure(made.tasks[1])


def test_kernels_have_files_for_sockets_however_long_the_folder_for_temporary_files_is(tmp_path, monkeypatch):
    usual = tmp_path / ("as long as on macOS" * 3)
    usual.mkdir()
    body = 'from ipykernel.kernelapp import IPKernelApp\nrun.record([{"transport": IPKernelApp.instance().transport}])'
    notebook(tmp_path, "50_sockets", body, FINISH)
    monkeypatch.setattr(tempfile, "tempdir", str(usual))
    (task,) = sweep(sweep_file(tmp_path, entry("50_sockets"))).tasks
    assert pd.read_parquet(task.folder / "rows.parquet")["transport"].tolist() == ["ipc"]


@pytest.mark.parametrize("number, warm", [(signal.SIGINT, WARM), (signal.SIGTERM, False)])
def test_an_interrupt_while_a_run_is_being_started_ends_it_too(tmp_path, notes, monkeypatch, number, warm):
    notebook(tmp_path, "50_short", MARK, FINISH)
    (task,) = plan.load(sweep_file(tmp_path, entry("50_short", fixed={"notes": str(notes)})), str(tmp_path / "out"))
    task.folder.mkdir(parents=True)
    started = []

    def start(process):
        BaseProcess.start(process)
        started.append(process.pid)
        signal.raise_signal(number)

    monkeypatch.setattr(multiprocessing.context.ForkServerProcess if warm else multiprocessing.context.SpawnProcess, "start", start)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Pool(1, warm=warm) as pool:
            pool.start(task)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    (pid,) = started
    assert not is_alive(pid)
    assert not list((tmp_path / "temporary").glob("mu-*")) and not marks(notes)


def test_what_interrupts_twice_is_raised_once_and_only_what_comes_later_again():
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    with held_back():
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_pool_that_is_not_entered_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    Pool(1)
    assert not list(tmp_path.iterdir())


def test_gpus_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert gpus() == ["2", "5"]
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert gpus() == []
