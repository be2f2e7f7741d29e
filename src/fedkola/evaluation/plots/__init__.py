"""Plots of pages and reports, as inline SVG, and numbers as text."""

from fedkola.evaluation.plots.attacks import Scored, intervals
from fedkola.evaluation.plots.draw import STEPS, bar, shade, shades, standalone
from fedkola.evaluation.plots.run import accuracy, arrivals, lives, traffic
from fedkola.evaluation.plots.suite import COLUMNS, Mark, frontier, grouped, heat, panels
from fedkola.evaluation.plots.words import (
    DASH,
    MINUS,
    clip,
    count,
    megabytes,
    number,
    percent,
    seconds,
)

__all__ = [
    "COLUMNS",
    "DASH",
    "MINUS",
    "STEPS",
    "Mark",
    "Scored",
    "accuracy",
    "arrivals",
    "bar",
    "clip",
    "count",
    "frontier",
    "grouped",
    "heat",
    "intervals",
    "lives",
    "megabytes",
    "number",
    "panels",
    "percent",
    "seconds",
    "shade",
    "shades",
    "standalone",
    "traffic",
]
