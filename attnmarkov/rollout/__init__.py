"""Rollouts: one entry point, engines side by side."""

from attnmarkov.rollout.api import ENGINES, log_spaced, rollout
from attnmarkov.rollout.engine import Engine
from attnmarkov.rollout.reference import Reference
from attnmarkov.rollout.scan import Scan
from attnmarkov.rollout.skip_ahead import SkipAhead
from attnmarkov.rollout.trajectory import Trajectory
from attnmarkov.rollout.urn import Urn

__all__ = [
    "ENGINES",
    "Engine",
    "Reference",
    "Scan",
    "SkipAhead",
    "Trajectory",
    "Urn",
    "log_spaced",
    "rollout",
]
