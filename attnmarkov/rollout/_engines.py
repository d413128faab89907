"""The engines by name, and which of them can do what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from attnmarkov.rollout.pallas import Pallas
from attnmarkov.rollout.reference import Reference
from attnmarkov.rollout.rejection import Rejection
from attnmarkov.rollout.scan import Scan
from attnmarkov.rollout.skip_ahead import SkipAhead
from attnmarkov.rollout.urn import Urn

if TYPE_CHECKING:
    from attnmarkov.prompts import Prompts
    from attnmarkov.rollout.engine import Engine
    from attnmarkov.rollout.law import Law
    from attnmarkov.rollout.summary import Summary

_MANY = 1024  # tokens from which "rejection" is faster than "scan"
_KEPT = 2**16  # the most steps of a history that "auto" keeps, so that memory is bounded
ENGINES: dict[str, Engine] = {
    "reference": Reference(),
    "scan": Scan(),
    "rejection": Rejection(),
    "skip_ahead": SkipAhead(),
    "urn": Urn(),
    "pallas": Pallas(),
}


def choose(law: Law, record: str | Summary, prompts: Prompts, num_steps: int) -> str:
    """The engine of ``"auto"``; crossovers as measured by ``benchmarks/`` on CPU."""

    def takes(name: str) -> bool:
        return ENGINES[name].refusal(law, record) is None

    if num_steps >= Scan.max_context // 2 and takes("skip_ahead"):
        return "urn" if takes("urn") else "skip_ahead"
    many = law.num_tokens >= _MANY and jax.default_backend() == "cpu"
    if many and num_steps <= _KEPT and prompts.tokens is not None and takes("rejection"):
        return "rejection"
    return "scan" if takes("scan") else "reference"


def too_long(engine: Engine, longest: int, traced: bool) -> str | None:
    """Why an engine can't hold a history of this length, or None."""
    most = min(engine.max_context, Scan.max_context) if traced else engine.max_context
    if longest <= most:
        return None
    return f"can't count a history of {longest} tokens{' inside jit' * traced}, {most} at most"


def able(law: Law, record: str | Summary, longest: int, traced: bool) -> list[str]:
    """The engines that can make the record of a history of this length."""
    return [
        name
        for name, engine in ENGINES.items()
        if engine.refusal(law, record) is None and too_long(engine, longest, traced) is None
    ]
