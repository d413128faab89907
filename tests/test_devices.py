"""The same draws on one device, on eight, and on those of two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).with_name("device_script.py")
NOTES = (" first", " devices", " replicated")


def start(out, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, "-W", "error", str(SCRIPT), str(out), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(processes, outs):
    results = []
    try:
        for process, out in zip(processes, outs, strict=True):
            said, _ = process.communicate(timeout=200)
            assert process.returncode == 0, said
            results.append(dict(np.load(out)))
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one device gives."""
    out = tmp_path_factory.mktemp("devices") / "one.npz"
    return finish([start(out, 1)], [out])[0]


def test_eight_devices_give_the_draws_of_one(alone, tmp_path):
    out = tmp_path / "eight.npz"
    (eight,) = finish([start(out, 8)], [out])
    assert set(eight) == set(alone)
    assert len(alone) > 90
    for name, array in eight.items():
        if not name.endswith(NOTES):
            np.testing.assert_array_equal(array, alone[name], name)
    spread = [n for n in eight if n.endswith(" devices") and not n.startswith(("odd", "split"))]
    assert len(spread) > 20  # the others are cut to size, or put together from parts
    for name in spread:
        assert (eight[name], alone[name]) == (8, 1), name
        assert not eight[name.replace("devices", "replicated")], name


def test_two_processes_hold_their_rows_of_the_same_draws(alone, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    outs = [tmp_path / f"{i}.npz" for i in range(2)]
    first, second = finish([start(out, 2, port, 2, i) for i, out in enumerate(outs)], outs)
    names = [name for name in first if not name.endswith(NOTES)]
    assert len(names) > 9
    for name in names:
        if name == "skip_ahead":
            np.testing.assert_array_equal(first[name], alone[name])
            np.testing.assert_array_equal(second[name], alone[name])
            continue
        assert first[f"{name} devices"] == second[f"{name} devices"] == 4, name
        assert (first[f"{name} first"], second[f"{name} first"]) == (0, 8), name
        both = np.concatenate([first[name], second[name]])
        np.testing.assert_array_equal(both, alone[name], name)
