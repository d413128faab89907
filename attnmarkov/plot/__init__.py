"""Figures: functions that take a rollout or a dataset and an Axes."""

from attnmarkov.plot.absorption import absorption_times, absorption_winners, collapse_times
from attnmarkov.plot.basins import basins
from attnmarkov.plot.budget import budget_errors, budget_risks
from attnmarkov.plot.coverage import coverage_threshold, lost_contrasts
from attnmarkov.plot.decoding import decoding_costs, decoding_phases, losers_by_decade
from attnmarkov.plot.diagnostics import diagnostics, distinct_ngrams, top_shares
from attnmarkov.plot.exponents import growth_exponents
from attnmarkov.plot.frequencies import frequencies
from attnmarkov.plot.implicit_bias import implicit_bias
from attnmarkov.plot.information import information
from attnmarkov.plot.learning import learning_curves, learning_ratios
from attnmarkov.plot.portraits import phase_portrait, two_token_diagram, two_token_wins
from attnmarkov.plot.positions import log_weights, positional_curves
from attnmarkov.plot.winner_sets import winner_set_shares

__all__ = [
    "absorption_times",
    "absorption_winners",
    "basins",
    "budget_errors",
    "budget_risks",
    "collapse_times",
    "coverage_threshold",
    "decoding_costs",
    "decoding_phases",
    "diagnostics",
    "distinct_ngrams",
    "frequencies",
    "growth_exponents",
    "implicit_bias",
    "information",
    "learning_curves",
    "learning_ratios",
    "log_weights",
    "losers_by_decade",
    "lost_contrasts",
    "phase_portrait",
    "positional_curves",
    "top_shares",
    "two_token_diagram",
    "two_token_wins",
    "winner_set_shares",
]
