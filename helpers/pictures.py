"""Pictures as they are committed: a palette of few colours, a quarter of the bytes that Matplotlib writes or less.

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
import numpy as np
from PIL import Image

from helpers import provenance

COMMON, OTHERS, MOST = 24, 12, 64  # colours kept as they are, and for all the rest; of a picture of continuous colours
OFF = 1.0  # mean difference of the levels, of 255, from which on a picture gets MOST colours


def shrink(png: bytes) -> bytes:
    """The same picture on white with few colours, if that is smaller; a picture that was shrunk before stays as it is.

    The COMMON most frequent colours stay, so that lines, grids and the cells of a heat map keep theirs; what smooths edges goes to the
    nearest of these and OTHERS more. Where that changes more than edges, as in a continuous scale, all MOST colours are chosen anew.
    """
    picture = Image.open(io.BytesIO(png))
    if picture.mode == "P" and picture.getcolors(MOST):
        return png
    plain = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
    pixels = np.asarray(plain).reshape(-1, 3)
    colours, at, counts = np.unique(pixels, axis=0, return_inverse=True, return_counts=True)
    # the default method merges the colours of thin lines; this one keeps every line of a figure in its own
    spread = lambda n: plain.quantize(n, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    others = np.reshape(spread(OTHERS).getpalette()[: 3 * OTHERS], (-1, 3))
    palette = np.unique(np.concatenate([colours[np.argsort(-counts, kind="stable")[:COMMON]], others]), axis=0)
    nearest = ((colours[:, None].astype(int) - palette) ** 2).sum(-1).argmin(1)[at.ravel()]
    small = Image.fromarray(nearest.astype(np.uint8).reshape(plain.height, plain.width), "P")
    small.putpalette(palette.astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    (small if np.abs(palette[nearest].astype(int) - pixels).mean() < OFF else spread(MOST)).save(buffer, "PNG", optimize=True)
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
