"""Markov sources: transition matrices, their ensembles, and what is known of them exactly."""

from attnmarkov.chains.ensembles import random_transition_matrix, zipf_law
from attnmarkov.chains.markov import MarkovChain

__all__ = ["MarkovChain", "random_transition_matrix", "zipf_law"]
