"""All figures; a notebook cell calls one function and gets a matplotlib Figure back.

Every function takes a tidy table; chance level and ceiling are drawn where accuracy is shown.
"""

from helpers.plots.attacks import access_bars, line_panels
from helpers.plots.dots import dot_panels
from helpers.plots.editing import estimates, spider, tradeoff
from helpers.plots.explanations import slope_forest, start_layers
from helpers.plots.ladder import ladder, norm_growth
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
from helpers.plots.memory import memory_bars
from helpers.plots.scaling import cost_lines
from helpers.plots.series import format_bars, layer_lines, probe_lines, training_curve
from helpers.plots.style import STREAM, canvas, reference

__all__ = [
    "STREAM",
    "access_bars",
    "agreement_map",
    "canvas",
    "chosen_map",
    "circuit",
    "cost_lines",
    "dot_panels",
    "estimates",
    "faithfulness_lines",
    "format_bars",
    "head_map",
    "ladder",
    "layer_lines",
    "layer_maps",
    "line_panels",
    "memory_bars",
    "norm_growth",
    "probe_lines",
    "reference",
    "score_map",
    "slope_forest",
    "spider",
    "stability_dots",
    "start_layers",
    "tradeoff",
    "training_curve",
]
