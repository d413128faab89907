"""Figures: functions that take a rollout or a dataset and an Axes."""

from attnmarkov.plot.coverage import coverage_threshold, lost_contrasts
from attnmarkov.plot.exponents import growth_exponents
from attnmarkov.plot.frequencies import frequencies
from attnmarkov.plot.implicit_bias import implicit_bias
from attnmarkov.plot.learning import learning_curves

__all__ = [
    "coverage_threshold",
    "frequencies",
    "growth_exponents",
    "implicit_bias",
    "learning_curves",
    "lost_contrasts",
]
