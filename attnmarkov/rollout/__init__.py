"""Rollouts: one entry point, engines side by side."""

from attnmarkov.rollout._engines import ENGINES
from attnmarkov.rollout.api import log_spaced, rollout, rollout_chunks
from attnmarkov.rollout.engine import Engine
from attnmarkov.rollout.law import Law
from attnmarkov.rollout.pallas import Pallas
from attnmarkov.rollout.reference import Reference
from attnmarkov.rollout.rejection import Rejection
from attnmarkov.rollout.scan import Scan
from attnmarkov.rollout.skip_ahead import SkipAhead
from attnmarkov.rollout.summary import Summaries, Summary
from attnmarkov.rollout.support import SupportTrajectory
from attnmarkov.rollout.trajectory import Trajectory
from attnmarkov.rollout.urn import Urn

__all__ = [
    "ENGINES",
    "Engine",
    "Law",
    "Pallas",
    "Reference",
    "Rejection",
    "Scan",
    "SkipAhead",
    "Summaries",
    "Summary",
    "SupportTrajectory",
    "Trajectory",
    "Urn",
    "log_spaced",
    "rollout",
    "rollout_chunks",
]
