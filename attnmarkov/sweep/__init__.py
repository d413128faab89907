"""Sweeps: an experiment's grid, run block by block into a store that survives interruption."""

from attnmarkov.sweep.experiment import Claim, Config, Experiment, Layout, Verdict
from attnmarkov.sweep.runner import run
from attnmarkov.sweep.store import open_results

__all__ = ["Claim", "Config", "Experiment", "Layout", "Verdict", "open_results", "run"]
