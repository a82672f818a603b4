"""The notebook runner on small notebooks, executed for real."""

import asyncio
import base64
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import papermill
import psutil
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from helpers import conventions, cores, notebooks, pictures, provenance

PARAMETERS = """model: str = "tiny-llama3"  # a tiny name, a local path or a hub id
seed: int = 0  # of every random choice
profile: str = "standard"  # quick, standard or full
out: str = "runs"  # folder for rows and figures
device: str = "cpu"  # auto, cpu, mps or cuda"""
GOOD = [
    "model = object()\nmine = 3",
    'fig, ax = plt.subplots(figsize=(1, 1))\nax.plot([0, 1])\nrun.figure(fig, "line")',
    'run.record([{"layer": 0, "score": 0.5}])',
    'run.check("half is a half", 0.5, True)\nrun.check("half is one", 0.5, False)',
    # what a reader in JupyterLab does: the second cell again, after names were re-used
    'first, run = run, runs.start("{stem}", globals())\nassert first.id == run.id',
    'run.record([{"layer": 0, "score": 0.5}])\nrun.check("half is a half", 0.5, True)',
    "list(runs.progress(range(3), 'counting'))",
    "run.finish()",
]


def write(folder: Path, stem: str, body: list[str]) -> Path:
    start = f'import matplotlib.pyplot as plt\n\nfrom helpers import runs\n\nrun = runs.start("{stem}", globals())'
    sources = [start, *(source.replace("{stem}", stem) for source in body)]
    cells = [new_markdown_cell(f"# Title of {stem}\n\nWhere is the\nfact?\n\nMore."), new_code_cell(PARAMETERS)]
    cells[1].metadata["tags"] = ["parameters"]
    path = folder / f"{stem}.ipynb"
    metadata = {"kernelspec": notebooks.KERNELSPEC}
    nbformat.write(new_notebook(cells=[*cells, *map(new_code_cell, sources)], metadata=metadata), path)
    return path


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A good and a broken notebook after `run`, from a working directory that is not the project's."""
    root = tmp_path_factory.mktemp("project")
    for stem, body in {"00_broken": ["1 / 0"], "01_good": GOOD}.items():
        write(root, stem, body)
    arguments = ["--notebooks", str(root), "--profile", "quick", "--out", str(root / "out"), "-p", "seed", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("JUPYTER_RUNTIME_DIR", str(root / "kernels"))
        status = notebooks.main(["run", *arguments])
    return root, status


def test_notebooks_side_by_side_share_the_cores(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cores, "n_cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    threads = "import os\nprint(os.environ['OMP_NUM_THREADS'], 'threads')"
    for stem, body in {"00_broken": [threads, "1 / 0"], "01_good": [threads, "run.finish()"]}.items():
        write(tmp_path, stem, body)
    assert notebooks.main(["run", "--jobs", "2", "--notebooks", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert all("3 threads" in texts(tmp_path / "out" / f"{stem}.ipynb") for stem in ("00_broken", "01_good"))
    assert os.environ["OMP_NUM_THREADS"] == "5"
    first, broken, good, _ = capsys.readouterr().out.splitlines()
    assert first == "running 00_broken, 01_good, 2 at a time"
    assert broken.startswith("00_broken … ") and broken.endswith("FAILED: ZeroDivisionError: division by zero")
    assert good.startswith("01_good … ") and "FAILED" not in good
    assert "Title of 01_good" in (tmp_path / "out" / "index.html").read_text()


def texts(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") or str(output.get("data") or output.get("ename")) for output in outputs)


def test_a_broken_notebook_is_kept_and_the_others_go_on(executed):
    root, status = executed
    assert status == 1
    assert "ZeroDivisionError" in (root / "out" / "00_broken.html").read_text()
    assert "ZeroDivisionError" in texts(root / "out" / "00_broken.ipynb")
    index = (root / "out" / "index.html").read_text()
    assert "ZeroDivisionError: division by zero" in index
    assert "Title of 01_good" in index
    assert "Where is the fact?" in index
    assert "1 of 1 hold" in index


def test_a_good_notebook_leaves_rows_figures_and_a_quiet_log(executed):
    root, _ = executed
    (folder,) = (root / "out" / "01_good").iterdir()
    # the second start began the run anew, so the rows of before are gone, and so is the figure
    assert sorted(path.name for path in folder.iterdir()) == [
        "checks.json",
        "done.json",
        "parameters.json",
        "provenance.json",
        "rows.parquet",
    ]
    assert pd.read_parquet(folder / "rows.parquet")[["seed", "profile"]].values.tolist() == [[4, "quick"]]
    shown = texts(root / "out" / "01_good.ipynb")
    assert "image/png" in shown
    assert "counting" not in shown
    assert "does not hold" in shown
    assert folder.name in shown


def test_sources_are_untouched_by_run(executed):
    root, _ = executed
    assert all(not cell.get("outputs") for cell in nbformat.read(root / "01_good.ipynb", as_version=4).cells)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["-p", "modle", "x"], "01_good.ipynb: unknown parameter `modle`, did you mean `model`?"),
        (["-p", "seed", "one"], "parameter `seed`"),
        (["--profile", "fast"], "'smoke', 'quick', 'standard' or 'full'"),
        (["09"], "no notebook `09`"),
        (["seed=2"], "is it a parameter? -p seed 2"),
    ],
)
def test_the_runner_refuses_before_a_kernel_starts(tmp_path, capsys, monkeypatch, given, message):
    write(tmp_path, "01_good", GOOD)
    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **k: pytest.fail("a kernel was started"))
    assert notebooks.main(["run", "--notebooks", str(tmp_path), "--out", str(tmp_path / "out"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_each_of_several_notebooks_gets_the_parameters_it_has(tmp_path, capsys):
    for stem in ("01_with", "02_without"):
        write(tmp_path, stem, ["print(sorted(run.params.model_dump().items()))", "run.finish()"])
    path = tmp_path / "01_with.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source = 'lookup: str = ""\n' + notebook.cells[1].source
    nbformat.write(notebook, path)
    given = ["--notebooks", str(tmp_path), "--out", str(tmp_path / "out"), "-p", "lookup", "3", "-p", "seed", "5"]
    assert notebooks.main(["run", *given]) == 0
    assert "('lookup', '3')" in texts(tmp_path / "out" / path.name)  # text, as it is declared
    assert all("('seed', 5)" in texts(tmp_path / "out" / f"{stem}.ipynb") for stem in ("01_with", "02_without"))
    assert "lookup" not in texts(tmp_path / "out" / "02_without.ipynb")
    assert notebooks.main(["run", "02", *given]) == 2 and "02_without.ipynb: unknown parameter `lookup`" in capsys.readouterr().err


def test_papermill_s_own_command_line_stops_at_a_misspelt_name(tmp_path):
    path = write(tmp_path, "01_good", GOOD)
    command = [sys.executable, "-m", "papermill", str(path), str(tmp_path / "executed.ipynb")]
    command += ["-p", "modle", "x", "-p", "out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(provenance.project_root())}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 1
    assert "ParameterError: unknown parameter `modle`, did you mean `model`?" in result.stderr
    assert "valid parameters: profile, seed, out" in result.stderr
    assert not (tmp_path / "out").exists()


def test_write_back_keeps_outputs_and_strips_what_is_volatile(tmp_path):
    path = write(tmp_path, "01_good", [GOOD[1], "1 + 1", "run.finish()", "import pandas\npandas.DataFrame([7])"])
    given = {"profile": "standard", "out": str(tmp_path / "out"), "figures": str(tmp_path / "figures")}
    (outcome,) = notebooks.run([path], given, tmp_path / "out", write_back=True)
    assert outcome.error == ""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert [dict(cell.metadata) for cell in code] == [{"tags": ["parameters"]}] + [{}] * 5
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4, 5, 6]
    assert code[0].source == PARAMETERS
    assert code[3].outputs[0].data["text/plain"] == "2"
    assert set(code[5].outputs[0].data) == {"text/html"}
    assert code[3].outputs[0].execution_count == 4
    shown = base64.b64decode(code[2].outputs[0].data["image/png"])
    assert shown == (tmp_path / "figures" / "01_good_line.png").read_bytes() and Image.open(io.BytesIO(shown)).mode == "P"


def test_a_shrunk_picture_is_the_same_to_the_eye():
    fig, ax = plt.subplots()
    ax.imshow(np.linspace(0, 1, 400).reshape(20, 20), cmap="viridis")
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png")
    plt.close(fig)
    small = pictures.shrink(buffer.getvalue())
    assert len(small) < len(buffer.getvalue()) and pictures.shrink(small) == small
    old, new = (np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int) for png in (buffer.getvalue(), small))
    assert old.shape == new.shape and np.abs(old - new).max() < 16 and np.abs(old - new).mean() < 2


def test_write_back_takes_no_parameters(tmp_path, capsys):
    write(tmp_path, "01_good", GOOD)
    assert notebooks.main(["regenerate", "--notebooks", str(tmp_path), "-p", "model", "x"]) == 2
    assert "leave -p out" in capsys.readouterr().err


def test_a_failed_notebook_is_not_written_back(tmp_path):
    path = write(tmp_path, "00_broken", ["1 / 0"])
    before = path.read_bytes()
    notebooks.run([path], {"out": str(tmp_path / "out")}, tmp_path / "out", write_back=True)
    assert path.read_bytes() == before


def test_no_kernel_is_left_behind(executed):
    root, _ = executed
    assert list((root / "kernels").glob("kernel-*")) == []
    # multiprocessing keeps servers of its own until the interpreter ends, whichever test of this process started them
    assert [p for p in psutil.Process().children(recursive=True) if "from multiprocessing." not in " ".join(p.cmdline())] == []


def test_conventions(tmp_path):
    path = write(tmp_path, "01_good", [*GOOD, *["1 + 1"] * 15])
    assert conventions.problems(path) == []
    assert notebooks.main(["check", "--notebooks", str(tmp_path)]) == 0


def test_conventions_name_each_problem(tmp_path):
    path = write(tmp_path, "01_other", ["x = 1\n" * 26, 'open("/data/model/x")', "y = '../a/b' + 'https://a.org/b/c'"])
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].source += "\nlimit: int | None = None"
    notebook.cells[2].source = notebook.cells[2].source.replace("01_other", "01_copy")
    notebook.cells[3].outputs = [new_output("error", ename="E", evalue="", traceback=[])]
    nbformat.write(notebook, path)
    found = "\n".join(conventions.problems(path))
    assert 'does not call runs.start("01_other", globals())' in found
    assert "papermill cannot read the declaration of `limit`" in found
    assert "has 5 code cells" in found
    assert "a code cell of 26 lines" in found
    assert "code cell 3 stores an error" in found
    assert "code cell 4 names the absolute path `/data/model`" in found
    assert "code cell 5" not in found
    notebook.cells[1].metadata = {}
    nbformat.write(notebook, path)
    assert any("is not tagged" in problem for problem in conventions.problems(path))


def test_kernels_are_of_this_interpreter_and_use_files_where_paths_are_short(monkeypatch):
    monkeypatch.setattr(KernelSpecManager, "_kernel_dirs_default", lambda self: pytest.fail("looked for kernels"))
    for folder, transport in (("/run/short", "ipc"), ("/run/" + "long" * 20, "tcp")):
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", folder)
        kernel = notebooks.LocalKernel(kernel_name="python3")
        assert kernel.kernel_spec.argv[0] == sys.executable
        assert kernel.transport == (transport if os.name == "posix" else "tcp")


@pytest.mark.parametrize("folder", ["short", "long" * 20])
def test_kernels_started_at_once_have_sockets_of_their_own(folder, monkeypatch):
    """Files where paths are short, else ports; each kernel has five, and answers on them."""
    home = Path(tempfile.mkdtemp(dir="/tmp", prefix="k"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(home / folder))
    kernels = [notebooks.LocalKernel(kernel_name="python3") for _ in range(4)]

    async def start() -> list[dict]:
        await asyncio.gather(*(kernel.start_kernel() for kernel in kernels))
        clients = [kernel.client() for kernel in kernels]
        for client in clients:
            client.start_channels()
        await asyncio.gather(*(client.wait_for_ready(timeout=120) for client in clients))
        named = [kernel.get_connection_info() for kernel in kernels]
        for kernel, client in zip(kernels, clients):
            client.stop_channels()
            await kernel.shutdown_kernel(now=True)
        return named

    named = asyncio.run(start())
    sockets = {(one["ip"], one[f"{channel}_port"]) for one in named for channel in ("shell", "iopub", "stdin", "hb", "control")}
    assert len(sockets) == 5 * len(kernels) and len({kernel.connection_file for kernel in kernels}) == len(kernels)
    assert {one["transport"] for one in named} == {"ipc" if folder == "short" and os.name == "posix" else "tcp"}
    shutil.rmtree(home)
