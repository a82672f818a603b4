"""The form every notebook keeps, checked on the file without running it."""

import re
import statistics
from pathlib import Path

import nbformat
import papermill
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME

from helpers import parameters
from helpers.parameters import PARAMETERS_TAG, ParameterError

FEWEST_CELLS, MOST_CELLS = 20, 45
LONGEST_CELL, MEDIAN_CELL = 25, 6

# a rooted path of two or more parts that is not the end of a URL, a tag or a relative path
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<~\\-])(?:/[\w.-]+/[\w.-]+|[A-Za-z]:\\\w)")


def problems(path: Path) -> list[str]:
    """What a notebook does against the conventions, one sentence each; empty when it keeps them all."""
    notebook = nbformat.read(path, as_version=4)
    if notebook.metadata.get("kernelspec", {}).get("name") != NATIVE_KERNEL_NAME:
        # papermill needs to be told the kernel, and any other one is missing on the next machine
        return [f"does not name the kernel `{NATIVE_KERNEL_NAME}`"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = _opening_problems(path, code)
    if not FEWEST_CELLS <= len(code) <= MOST_CELLS:
        found.append(f"has {len(code)} code cells, not {FEWEST_CELLS} to {MOST_CELLS}")
    lengths = [len(cell.source.strip().splitlines()) for cell in code] or [0]
    if max(lengths) > LONGEST_CELL:
        found.append(f"has a code cell of {max(lengths)} lines, more than {LONGEST_CELL}")
    if statistics.median(lengths) > MEDIAN_CELL:
        found.append(f"has a median code cell of {statistics.median(lengths):g} lines, more than {MEDIAN_CELL}")
    for number, cell in enumerate(code, start=1):
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"code cell {number} stores an error")
        if match := ABSOLUTE_PATH.search("\n".join([cell.source, *_texts(cell)])):
            found.append(f"code cell {number} names the absolute path `{match.group()}`")
    return found


def _opening_problems(path: Path, code: list[nbformat.NotebookNode]) -> list[str]:
    found = []
    if not code or PARAMETERS_TAG not in code[0].metadata.get("tags", []):
        return [f"the first code cell is not tagged `{PARAMETERS_TAG}`"]
    if len(code) < 2 or f'runs.start("{path.stem}", globals())' not in code[1].source:
        found.append(f'the second code cell does not call runs.start("{path.stem}", globals())')
    try:
        parameters.from_notebook(path, {})
    except ParameterError as error:
        return [*found, f"the parameters cell is refused: {error}"]
    seen = papermill.inspect_notebook(str(path))
    for name in parameters.declared_names(code[0].source):
        # what papermill cannot read is missing from its --help-notebook
        if name not in seen:
            found.append(f"papermill cannot read the declaration of `{name}`")
        elif not seen[name]["help"]:
            found.append(f"parameter `{name}` has no comment")
    return found


def _texts(cell: nbformat.NotebookNode) -> list[str]:
    streams = [output.text for output in cell.outputs if output.output_type == "stream"]
    shown = [output.data for output in cell.outputs if "data" in output]
    return streams + [data[kind] for data in shown for kind in ("text/plain", "text/html") if kind in data]
