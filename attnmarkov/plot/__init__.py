"""Figures: functions that take a rollout or a dataset and an Axes."""

from attnmarkov.plot.budget import budget_errors, budget_risks
from attnmarkov.plot.coverage import coverage_threshold, lost_contrasts
from attnmarkov.plot.exponents import growth_exponents
from attnmarkov.plot.frequencies import frequencies
from attnmarkov.plot.implicit_bias import implicit_bias
from attnmarkov.plot.information import information
from attnmarkov.plot.learning import learning_curves, learning_ratios
from attnmarkov.plot.positions import log_weights, positional_curves

__all__ = [
    "budget_errors",
    "budget_risks",
    "coverage_threshold",
    "frequencies",
    "growth_exponents",
    "implicit_bias",
    "information",
    "learning_curves",
    "learning_ratios",
    "log_weights",
    "lost_contrasts",
    "positional_curves",
]
