"""Rollouts: one entry point, engines side by side."""

from attnmarkov.rollout.api import ENGINES, log_spaced, rollout
from attnmarkov.rollout.engine import Engine
from attnmarkov.rollout.reference import Reference
from attnmarkov.rollout.scan import Scan
from attnmarkov.rollout.trajectory import Trajectory

__all__ = ["ENGINES", "Engine", "Reference", "Scan", "Trajectory", "log_spaced", "rollout"]
