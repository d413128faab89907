"""Lanes shared among the cores of a CPU: the same bits, the caller's settings."""

from __future__ import annotations

import threading
from typing import Any

import jax
import numpy as np
import pytest

import attnmarkov as am
from attnmarkov.rollout import _cores

MODEL = am.CCMC.from_transition_matrix([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])


def rolled(key, record, engine, lanes=96):
    out = am.rollout(MODEL, key, [0, 1, 2], 50, lanes, engine, record, at=None)
    return [np.asarray(x) for x in jax.tree.leaves(out)]


@pytest.mark.parametrize("engine", ["scan", "rejection"])
@pytest.mark.parametrize("record", ["tokens", "counts"])
def test_cores_change_nothing(monkeypatch, key, engine, record):
    alone = rolled(key, record, engine)
    monkeypatch.setattr(_cores, "_WORK", 0)
    threads = set()
    under = _cores._under

    def noted(*args):
        threads.add(threading.get_ident())
        return under(*args)

    monkeypatch.setattr(_cores, "_under", noted)
    for cores in (2, 3):
        monkeypatch.setattr(_cores, "count", lambda cores=cores: cores)
        for a, b in zip(rolled(key, record, engine), alone, strict=True):
            np.testing.assert_array_equal(a, b)
    assert threading.get_ident() not in threads
    assert threads


def test_summaries_are_the_same_too(monkeypatch, key):
    alone = rolled(key, "summary", "scan", 100)  # lanes that do not divide evenly
    monkeypatch.setattr(_cores, "_WORK", 0)
    monkeypatch.setattr(_cores, "count", lambda: 3)
    for a, b in zip(rolled(key, "summary", "scan", 100), alone, strict=True):
        np.testing.assert_array_equal(a, b)


def test_threads_take_the_settings_of_their_caller(monkeypatch):
    monkeypatch.setattr(_cores, "count", lambda: 2)
    device = jax.devices()[0]
    config: Any = jax.config
    with jax.enable_x64(True), jax.default_device(device):
        found = _cores.over_cores(
            lambda _: (config.jax_enable_x64, config.jax_default_device), iter("ab")
        )
    assert found == [(True, device)] * 2
    assert not config.jax_enable_x64


def test_errors_come_through(monkeypatch):
    monkeypatch.setattr(_cores, "count", lambda: 2)

    def fail(part):
        raise ValueError(f"no {part}")

    with pytest.raises(ValueError, match="no a"):
        _cores.over_cores(fail, iter("ab"))


def test_little_work_and_few_lanes_stay_together(monkeypatch):
    monkeypatch.setattr(_cores, "count", lambda: 8)
    assert _cores.parts(1000, 10, 3) == 1
    assert _cores.parts(1000, 10**6, 3) == 8
    assert _cores.parts(70, 10**7, 3) == 2
    assert _cores.parts(20, 10**9, 3) == 1
    monkeypatch.setattr(_cores, "count", lambda: 1)
    assert _cores.parts(1000, 10**6, 3) == 1


def test_inside_jit_there_are_no_threads(monkeypatch, key):
    monkeypatch.setattr(_cores, "_WORK", 0)
    monkeypatch.setattr(_cores, "_under", None)  # would fail if it were called
    monkeypatch.setattr(_cores, "count", lambda: 2)
    jax.jit(lambda k: am.rollout(MODEL, k, [0, 1, 2], 5, 96, "scan").tokens)(key)
