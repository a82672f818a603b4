"""Run the numbered notebooks headless, put their outputs back into the repository, check their form.

    python -m helpers.notebooks run 02 --profile quick --out runs -p model tiny-gemma2
    python -m helpers.notebooks run --jobs 2 -p model path/to/model -p lookup 2,3    # to those of them that have such a parameter
    python -m helpers.notebooks regenerate
    python -m helpers.notebooks check

`run` leaves executed copies, HTML and an `index.html`. Parameters are checked for every notebook
before the first kernel starts. A notebook that fails is kept with its traceback, the others go on,
and the exit status is 1.
"""

import argparse
import ast
import html
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.paths import jupyter_runtime_dir
from nbconvert import HTMLExporter

from helpers import conventions, cores, parameters, pictures, provenance, runs
from helpers.parameters import ParameterError

# a Unix socket's path holds about 104 characters, and Jupyter appends some 50 to its folder
LONGEST_SOCKET_FOLDER = 50
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": NATIVE_KERNEL_NAME}

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Notebooks</title><style>
body {{ font: 16px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
td, th {{ text-align: left; vertical-align: top; padding: .4em 1em .4em 0 }}
.number {{ text-align: right }} .error {{ color: #d55e00 }}
</style></head><body><h1>Notebooks</h1><table>
<tr><th>Notebook</th><th>Question</th><th>Minutes</th><th>Checks</th><th>Files</th></tr>
{rows}
</table></body></html>
"""


class LocalKernel(AsyncKernelManager):
    """A kernel of this very interpreter, whatever kernels are registered, that can import `helpers`."""

    def __init__(self, **options: Any) -> None:
        # files instead of TCP ports: kernels started side by side cannot take each other's port
        files = os.name == "posix" and len(jupyter_runtime_dir()) <= LONGEST_SOCKET_FOLDER
        specs = KernelSpecManager(kernel_dirs=[])
        # the sockets take their names from this file; without one, every kernel's would be kernel-ipc-1, -2 …
        folder = Path(jupyter_runtime_dir())
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        options.setdefault("connection_file", str(folder / f"kernel-{uuid.uuid4().hex}.json"))
        super().__init__(transport="ipc" if files else "tcp", kernel_spec_manager=specs, **options)

    async def start_kernel(self, **options: Any) -> None:
        search = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        quiet = {runs.HEADLESS_VARIABLE: "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        extra = {"PYTHONPATH": os.pathsep.join(filter(None, search)), **quiet}
        # its log tells of the interrupt that ends it, as an error; what goes wrong in a cell is in the notebook
        options["extra_arguments"] = [*options.get("extra_arguments", ()), "--log-level=CRITICAL"]
        await super().start_kernel(**options, env={**os.environ, **extra})


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook; `error` is empty when it ran to its end."""

    notebook: Path
    title: str
    question: str
    minutes: float
    held: int
    checks: int
    error: str


def select(names: Sequence[str], folder: Path) -> list[Path]:
    """The numbered notebooks of `folder` in order, or those named by stem or by number.

    Raises ValueError when there are none, or, with those there are, for a name without a notebook.
    """
    known = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not known:
        raise ValueError(f"no numbered notebook in {folder.name}/")
    for name in names:
        if not any(name in (path.stem, path.stem[:2]) for path in known):
            hint = f"; is it a parameter? -p {name.replace('=', ' ', 1)}" if "=" in name else ""
            raise ValueError(f"no notebook `{name}` in {folder.name}/: {', '.join(path.stem for path in known)}{hint}")
    return [path for path in known if not names or path.stem in names or path.stem[:2] in names]


def run(notebooks: Sequence[Path], given: Mapping[str, Any], out: Path, *, jobs: int = 1, write_back: bool = False) -> list[Outcome]:
    """Execute notebooks with the parameters `given`, `jobs` at a time; executed copies, HTML and the index go to `out`.

    A parameter that some of them declare goes to those. With `write_back`, a notebook that ran to its end gets the new outputs, free of
    volatile metadata, with small pictures. Raises ParameterError, with nothing written, when any notebook refuses a parameter.
    """
    declared = {path: set(parameters.declared_by(path).model_fields) for path in notebooks}
    somewhere, checked = set().union(*declared.values()), {}
    for path, names in declared.items():
        own = {name: value for name, value in given.items() if name in names or name not in somewhere}  # what none declares is refused
        try:
            checked[path] = own, parameters.from_notebook(path, own)
        except ParameterError as error:
            raise ParameterError(f"{path.name}: {error}") from error
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    tasks = [(path, own, out, runs.folder(path.stem, params)) for path, (own, params) in checked.items()]
    jobs = min(jobs, len(tasks))
    print(f"running {', '.join(path.stem for path in checked)}" + (f", {jobs} at a time" if jobs > 1 else ""), flush=True)
    for path, outcome in zip(checked, _outcomes(tasks, jobs)):
        print(f"{path.stem} … {_verdict(outcome)}", flush=True)
        outcomes.append(outcome)
        if write_back and not outcome.error:
            executed = nbformat.read(out / path.name, as_version=4)
            provenance.write_text(path, nbformat.writes(pictures.shrink_outputs(strip(executed))) + "\n")
            if "figures" in given:
                pictures.shrink_files((provenance.project_root() / given["figures"]).glob(f"{path.stem}_*.png"))
        # after each notebook, so that an interrupted run leaves an index as well
        provenance.write_text(out / "index.html", PAGE.format(rows="\n".join(map(_index_row, outcomes))))
    return outcomes


def strip(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out what changes from run to run (timings, versions, the injected cell), and tables' second copies; outputs stay."""
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}})
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    for count, cell in enumerate(code, start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            if "text/html" in (data := output.get("data", {})):
                data.pop("text/plain", None)  # the same table once more, a tenth of a notebook's bytes
    return notebook


def execute(path: Path, executed: Path, given: Mapping[str, Any], manager: type[AsyncKernelManager] = LocalKernel) -> str:
    """Execute a notebook, cell by cell saved to `executed`; returns what went wrong, empty if nothing did."""
    try:
        papermill.execute_notebook(
            path,
            executed,
            parameters=dict(given),
            kernel_name=NATIVE_KERNEL_NAME,
            language="python",
            kernel_manager_class=manager,
            cwd=path.parent,  # as in JupyterLab
            progress_bar=False,
        )
    except papermill.PapermillExecutionError as failure:
        return f"{failure.ename}: {failure.evalue}"
    except Exception as failure:  # a kernel that died or never came up, a full disk; other notebooks go on
        return f"{type(failure).__name__}: {failure}"
    return ""


def _outcomes(tasks: Sequence[tuple], jobs: int) -> Iterator[Outcome]:
    """What became of each notebook, in their order; `jobs` of them run side by side and share the cores."""
    if jobs == 1:
        yield from (_run_one(*task) for task in tasks)
        return
    # new interpreters, so that threads are set before anything is imported
    with cores.environment(cores.threads(cores.share(jobs))), ProcessPoolExecutor(jobs, get_context("spawn")) as processes:
        yield from processes.map(_run_one, *zip(*tasks))


def _run_one(path: Path, given: Mapping[str, Any], out: Path, results: Path) -> Outcome:
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of `figures`, which every notebook takes though none declares it
    started = time.monotonic()
    executed, stored = out / path.name, results / "checks.json"
    stored.unlink(missing_ok=True)  # the index must not show the verdicts of an earlier run
    error = execute(path, executed, given)
    minutes = (time.monotonic() - started) / 60
    if executed.exists():
        page, _ = HTMLExporter().from_filename(str(executed))
        provenance.write_text(executed.with_suffix(".html"), page)
    checks = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else []
    title, question = _title_and_question(path)
    return Outcome(path, title, question, minutes, sum(check["holds"] for check in checks), len(checks), error)


def _title_and_question(path: Path) -> tuple[str, str]:
    """The first heading and the first paragraph of prose."""
    cells = nbformat.read(path, as_version=4).cells
    prose = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    blocks = [block.strip() for block in prose.split("\n\n") if block.strip()]
    lines = [(block, *block.split("\n", 1)) for block in blocks]
    title = next((first.lstrip("# ") for _, first, *_ in lines if first.startswith("#")), path.stem)
    # a paragraph may follow its heading without a blank line
    texts = (rest[0] if first.startswith("#") and rest else block for block, first, *rest in lines)
    question = next((" ".join(text.split()) for text in texts if not text.startswith("#")), "")
    return title, question


def _verdict(outcome: Outcome) -> str:
    checks = f"{outcome.held} of {outcome.checks} checks hold"
    return f"{outcome.minutes:.1f} min, {checks}" + (f", FAILED: {outcome.error}" if outcome.error else "")


def _index_row(outcome: Outcome) -> str:
    title, question, error = (html.escape(text) for text in (outcome.title, outcome.question, outcome.error))
    name = outcome.notebook.stem
    failed = f'<br><b class="error">Failed</b>: {error}' if error else ""
    return (
        f'<tr><td><a href="{name}.html">{title}</a></td><td>{question}{failed}</td>'
        f'<td class="number">{outcome.minutes:.1f}</td><td>{outcome.held} of {outcome.checks} hold</td>'
        f'<td><a href="{name}.html">HTML</a> <a href="{name}.ipynb">notebook</a></td></tr>'
    )


def _value(text: str, name: str, notebooks: Sequence[Path]) -> Any:
    """A command line value: text for a parameter that is text, else the Python literal it spells."""
    field = next(filter(None, (parameters.declared_by(path).model_fields.get(name) for path in notebooks)), None)
    if field and field.annotation is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m helpers.notebooks", description="Run and check the notebooks.")
    parser.add_argument("action", choices=["run", "regenerate", "check"])
    parser.add_argument("names", nargs="*", help="stems or numbers (default: all)")
    parser.add_argument("--profile", default="quick", help="smoke, quick, standard or full (regenerate: always standard)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="executed copies, HTML, rows and figures")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks side by side, which share the cores")
    parser.add_argument("--write-back", action="store_true", help="put the outputs into the notebooks themselves")
    parser.add_argument("-p", dest="given", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="a parameter, for those of the notebooks that have it")
    parser.add_argument("--notebooks", type=Path, default=provenance.project_root() / "notebooks", help="their folder")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (1: a notebook failed, 2: nothing was started)."""
    parser = _arguments()
    # parse_intermixed: names may stand before and after options
    options = parser.parse_intermixed_args(arguments)
    try:
        notebooks = select(options.names, options.notebooks)
        if options.action == "check":
            problems = [f"{path.stem}: {problem}" for path in notebooks for problem in conventions.problems(path)]
            print("\n".join(problems) or f"{len(notebooks)} notebooks follow the conventions")
            return int(bool(problems))
        write_back = options.write_back or options.action == "regenerate"
        if write_back and options.given:
            raise ValueError("outputs that go into the notebooks come from their defaults: leave -p out")
        profile = "standard" if options.action == "regenerate" else options.profile
        given = {"profile": profile, "out": provenance.short_path(options.out)}
        given |= {"figures": "figures"} if write_back else {}
        given |= {name: _value(text, name, notebooks) for name, text in options.given}
        outcomes = run(notebooks, given, options.out, jobs=max(1, options.jobs), write_back=write_back)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"index: {options.out / 'index.html'}")
    return int(any(outcome.error for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
