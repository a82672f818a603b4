"""Pictures as they are committed: a palette of 64 colours, a quarter of the bytes that Matplotlib writes.

    shrink(png)                         # bytes in, bytes out
    shrink_outputs(notebook)            # all pictures among a notebook's outputs
    shrink_files(Path("figures").glob("02_*.png"))
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path

import nbformat
from PIL import Image

from helpers import provenance

COLOURS = 64


def shrink(png: bytes) -> bytes:
    """The same picture on white with at most COLOURS colours, if that is smaller; a picture that was shrunk before stays as it is."""
    picture = Image.open(io.BytesIO(png))
    if picture.mode == "P" and picture.getcolors(COLOURS):
        return png
    white = Image.new("RGBA", picture.size, "white")
    plain = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    buffer = io.BytesIO()
    # the default method merges the colours of thin lines; this one keeps every line of a figure in its own
    plain.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return min(png, buffer.getvalue(), key=len)


def shrink_outputs(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook, with its outputs' PNG pictures shrunk in place."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in (data := output.get("data", {})):
                data["image/png"] = base64.b64encode(shrink(base64.b64decode(data["image/png"]))).decode()
    return notebook


def shrink_files(files: Iterable[Path]) -> None:
    """Shrink PNG files, each replaced in one step."""
    for file in files:
        png = file.read_bytes()
        if (small := shrink(png)) != png:
            provenance.write_atomic(file, lambda path, small=small: path.write_bytes(small))
