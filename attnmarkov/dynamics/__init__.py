"""What long rollouts should show: equilibria, winners, exponents; and what sequences do show."""

from attnmarkov.dynamics.absorption import Absorption, absorption
from attnmarkov.dynamics.absorption_sample import AbsorptionSample, absorption_monte_carlo
from attnmarkov.dynamics.absorption_table import AbsorptionTable, absorption_table
from attnmarkov.dynamics.basins import Basins, basins, compositions, count_grid
from attnmarkov.dynamics.decoding import (
    DECODING_REGIMES,
    DecodingPrediction,
    decoding_cost,
    predict_decoding,
    staying_probability,
)
from attnmarkov.dynamics.diagnostics import Diagnostics, diagnose
from attnmarkov.dynamics.drift import drift, growth_exponents, stationary_law
from attnmarkov.dynamics.equilibria import Equilibria, Equilibrium, equilibria
from attnmarkov.dynamics.exponents import possible_winners, winner_exponents
from attnmarkov.dynamics.frequencies import fit_constants, predicted_frequencies
from attnmarkov.dynamics.growth import GrowthFit, fit_growth
from attnmarkov.dynamics.mean_field import MeanField, mean_field
from attnmarkov.dynamics.passage import PassageTimes, predicted_time_to_share, time_to_share
from attnmarkov.dynamics.two_token import REGIMES, TwoTokenPhases, two_token_phases
from attnmarkov.dynamics.urn_law import UrnWinners, urn_winners
from attnmarkov.dynamics.winner_probabilities import WinnerProbabilities, winner_probabilities

__all__ = [
    "DECODING_REGIMES",
    "REGIMES",
    "Absorption",
    "AbsorptionSample",
    "AbsorptionTable",
    "Basins",
    "DecodingPrediction",
    "Diagnostics",
    "Equilibria",
    "Equilibrium",
    "GrowthFit",
    "MeanField",
    "PassageTimes",
    "TwoTokenPhases",
    "UrnWinners",
    "WinnerProbabilities",
    "absorption",
    "absorption_monte_carlo",
    "absorption_table",
    "basins",
    "compositions",
    "count_grid",
    "decoding_cost",
    "diagnose",
    "drift",
    "equilibria",
    "fit_constants",
    "fit_growth",
    "growth_exponents",
    "mean_field",
    "possible_winners",
    "predict_decoding",
    "predicted_frequencies",
    "predicted_time_to_share",
    "stationary_law",
    "staying_probability",
    "time_to_share",
    "two_token_phases",
    "urn_winners",
    "winner_exponents",
    "winner_probabilities",
]
