"""Strict notebook parameters: what a notebook declares, what it was given, and whether the two agree.

The key detail: papermill does not stop at a misspelt name. `-p modle x` logs a warning, assigns an
unused variable and runs on with the default. So every notebook declares its parameters in one cell,

    model: str = "tiny-gemma2"  # tiny-*, a local path or a hub id
    profile: str = "standard"  # quick, standard or full

and the text of that cell is turned into a pydantic model. The values come from text as well: this
cell, the cell that papermill injects after it, and any later `name = literal` a reader types by
hand. The kernel's variables are never asked, because a notebook goes on to reuse its names
(`model = load_model(...)`) and a reader adds more; neither may trip a second run of the same cell.

The same two functions serve a running kernel (`from_history`) and a file (`from_notebook`), so a
sweep can refuse a bad value before it starts a kernel.
"""

import ast
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import PydanticCustomError, PydanticUndefined

PARAMETERS_TAG = "parameters"
# papermill's own first line in the cell it injects; nothing else marks that cell inside a kernel
INJECTED_FIRST_LINE = "# Parameters"

ANNOTATION_NAMES = {kind.__name__: kind for kind in (str, int, float, bool, list, dict)}


class ParameterError(ValueError):
    """A parameter is unknown, ill-typed, missing or not readable; the message says which and why."""


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|split|cuda(:\d+)?", name):
        raise PydanticCustomError("device", "a device is 'auto', 'cpu', 'mps', 'cuda', one GPU such as 'cuda:1', or 'split'")
    return name


class Parameters(BaseModel):
    """What every notebook takes. `model`, `facts` and a notebook's own fields are added by `from_cell`.

    `out` and `figures` are folders; a relative one counts from the project's root. `figures` also
    receives a copy of each figure (none when empty).
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    profile: Literal["smoke", "quick", "standard", "full"]
    seed: Annotated[int, Field(ge=0)] = 0
    out: str = "runs"
    figures: str = ""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def from_cell(source: str) -> type[Parameters]:
    """The pydantic model that a parameters cell declares, its literals as defaults.

    Raises ParameterError when the cell holds anything but annotated literal assignments, when a
    type is not a plain one, or when a default does not fit its type.
    """
    shared = get_type_hints(Parameters, include_extras=True)
    fields: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if not _is_declaration(node):
            raise ParameterError(f"a parameters cell holds `name: type = value` lines only, not `{ast.unparse(node)}`")
        name, default = node.target.id, _literal(node.target.id, node.value)
        # a shared field keeps its own, stricter type
        kind = shared[name] if name in Parameters.model_fields else _annotation(name, node.annotation)
        fields[name] = (kind, default)
    return create_model("NotebookParameters", __base__=Parameters, **fields)


def declared_names(source: str) -> list[str]:
    """The names a cell declares as parameters; empty for any other cell."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    names = [node.target.id for node in body if _is_declaration(node)]
    # `profile` is what makes it a parameters cell and not a reader's own `x: int = 3`
    return names if len(names) == len(body) and "profile" in names else []


def from_history(cells: Sequence[str]) -> Parameters:
    """The parameters of a running notebook, from the cells its kernel has executed (IPython's `In`).

    Raises ParameterError for an unknown injected name (with the closest valid one), an ill-typed
    value, or when no parameters cell has been run.
    """
    at = next((i for i in reversed(range(len(cells))) if declared_names(cells[i])), None)
    if at is None:
        raise ParameterError("no parameters cell has been run in this kernel: run the first code cell, then this one")
    declared = from_cell(cells[at])
    given: dict[str, Any] = {}
    for source in cells[at + 1 :]:
        injected = source.split("\n", 1)[0].strip() == INJECTED_FIRST_LINE
        for name, value in _assignments(source):
            if injected:
                given[name] = _literal(name, value)
            elif name in declared.model_fields and _is_literal(value):
                given[name] = ast.literal_eval(value)
    return validate(declared, given)


def from_notebook(path: Path | str, given: Mapping[str, Any]) -> Parameters:
    """The parameters a notebook file would run with, checked without starting a kernel.

    Raises ParameterError as `from_history` does, or when the notebook has no parameters cell.
    """
    return validate(declared_by(path), given)


def declared_by(path: Path | str) -> type[Parameters]:
    """The pydantic model that the parameters cell of a notebook file declares."""
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if PARAMETERS_TAG in cell["metadata"].get("tags", []):
            return from_cell("".join(cell["source"]))
    raise ParameterError(f"{Path(path).name} has no cell tagged `{PARAMETERS_TAG}`")


def validate(declared: type[Parameters], given: Mapping[str, Any]) -> Parameters:
    """`given` on top of the declared defaults; raises ParameterError with one line a problem."""
    # checked together with what is given: pydantic trusts its own defaults, a reader's edit is one
    defaults = {n: f.default for n, f in declared.model_fields.items() if f.default is not PydanticUndefined}
    try:
        return declared(**{**defaults, **given})
    except ValidationError as error:
        problems = [_describe(problem, declared) for problem in error.errors()]
    valid = "valid parameters: " + ", ".join(declared.model_fields)
    raise ParameterError("\n".join([*problems, valid]))


def _describe(problem: Mapping[str, Any], declared: type[Parameters]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, list(declared.model_fields), n=1)
        return f"unknown parameter `{name}`" + (f", did you mean `{close[0]}`?" if close else "")
    return f"parameter `{name}`: {problem['msg'][0].lower()}{problem['msg'][1:]} (got {problem['input']!r})"


def _is_declaration(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None


def _assignments(source: str) -> list[tuple[str, ast.expr]]:
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return []
    plain = [node for node in body if isinstance(node, ast.Assign)]
    return [(target.id, node.value) for node in plain for target in node.targets if isinstance(target, ast.Name)]


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def _literal(name: str, node: ast.expr) -> Any:
    text = ast.unparse(node)
    if text in ("float('nan')", "float('inf')", "float('-inf')"):  # papermill's spelling
        return float(text[7:-2])
    if not _is_literal(node):
        raise ParameterError(f"parameter `{name}` must be a literal value, not `{text}`")
    return ast.literal_eval(node)


def _annotation(name: str, node: ast.expr) -> Any:
    text = ast.unparse(node)
    try:
        return eval(text, {"__builtins__": {}}, ANNOTATION_NAMES)
    except (NameError, TypeError, AttributeError) as error:
        allowed = ", ".join(ANNOTATION_NAMES)
        raise ParameterError(f"parameter `{name}`: type `{text}` is not made of {allowed}") from error

