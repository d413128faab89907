"""Figures: functions that take a rollout or a dataset and an Axes."""

from attnmarkov.plot.exponents import growth_exponents
from attnmarkov.plot.frequencies import frequencies
from attnmarkov.plot.learning import learning_curves

__all__ = ["frequencies", "growth_exponents", "learning_curves"]
