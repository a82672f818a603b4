"""All figures; a notebook cell calls one function and gets a matplotlib Figure back.

Every function takes a tidy table; chance level and ceiling are drawn where accuracy is shown.
"""

from helpers.plots.localization import (
    agreement_map,
    chosen_map,
    circuit,
    faithfulness_lines,
    head_map,
    layer_maps,
    score_map,
    stability_dots,
)
from helpers.plots.series import format_bars, layer_lines, probe_lines, training_curve
from helpers.plots.style import canvas, reference

__all__ = [
    "agreement_map",
    "canvas",
    "chosen_map",
    "circuit",
    "faithfulness_lines",
    "format_bars",
    "head_map",
    "layer_lines",
    "layer_maps",
    "probe_lines",
    "reference",
    "score_map",
    "stability_dots",
    "training_curve",
]
