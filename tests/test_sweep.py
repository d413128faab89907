"""Sweeps: results depend on the experiment alone, and nothing that is finished is lost."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from dice_experiment import Dice

from attnmarkov import sweep
from attnmarkov.sweep import Claim

run = functools.partial(sweep.run, progress=False)


def assert_same(a: xr.Dataset, b: xr.Dataset) -> None:
    """Equal to the bit: values, dtypes, coordinates."""
    assert set(a.variables) == set(b.variables)
    for name in a.variables:
        assert a[name].dtype == b[name].dtype
        assert a[name].dims == b[name].dims
        assert a[name].values.tobytes() == b[name].values.tobytes(), name


def broken_after(calls: int, error: type[BaseException]) -> Dice:
    """A ``Dice`` that raises in one call of ``simulate`` after some that work."""

    @dataclasses.dataclass(frozen=True)
    class Broken(Dice):
        def simulate(self, config, key, replicates):
            left.pop()
            if not left:
                raise error("stop")
            return super().simulate(config, key, replicates)

    left = [None] * (calls + 1)
    return Broken()


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def dice() -> xr.Dataset:
    return run(Dice())


def test_dims_coordinates_and_provenance(dice):
    assert dict(dice.sizes) == {"config": 2, "replicate": 10, "step": 3}
    assert dice["num_sides"].dims == ("config",)
    assert dice["num_sides"].values.tolist() == [2, 6]
    assert dice["color"].values.tolist() == ["white", "white"]
    assert dice["throws"].dims == ("config", "replicate", "step")
    assert bool(dice["done"].all())
    assert (dice["throws"].dtype, dice["mean"].dtype, dice["six"].dtype) == ("i4", "f4", "?")
    assert dice["throws"].max("replicate").max("step").values.tolist() == [1, 5]
    assert dice.attrs["experiment"] == "dice"
    assert Dice.from_spec(dice.attrs["spec"]) == Dice()
    for key in ("attnmarkov", "jax", "backend", "device", "dtype", "created"):
        assert dice.attrs[key]
    assert "Dice" in dice.attrs["command"]


def test_replicates_and_grid_points_differ(dice):
    throws = dice["throws"].values
    assert len(np.unique(throws[1], axis=0)) > 5
    assert not np.array_equal(throws[0] % 2, throws[1] % 2)


@pytest.mark.parametrize("size", [1, 3, 10, 99])
def test_results_do_not_depend_on_the_block_size(dice, size, tmp_path):
    assert_same(dice, run(Dice(), tmp_path / "a.zarr", block_size=size))


def test_a_grid_points_bits_do_not_depend_on_the_rest_of_the_grid(dice):
    alone = run(Dice(sides=(6,)))
    assert np.array_equal(alone["throws"][0], dice["throws"][1])
    more = run(Dice(num_replicates=13))
    assert np.array_equal(more["throws"][:, :10], dice["throws"])
    other = run(Dice(seed=1))
    assert not np.array_equal(other["throws"], dice["throws"])


def test_xarray_opens_the_store_by_itself(dice, tmp_path):
    run(Dice(), tmp_path / "a.zarr")
    opened = xr.open_zarr(tmp_path / "a.zarr", consolidated=False)
    assert set(opened.coords) == {"config", "replicate", "step", "num_sides", "color"}
    assert opened["throws"].equals(dice["throws"].assign_coords(color=opened["color"]))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("calls", [0, 1, 4])
def test_an_interrupted_run_is_readable_and_resumes_to_the_same_bits(dice, tmp_path, error, calls):
    out = tmp_path / "a.zarr"
    with pytest.raises(error):
        run(broken_after(calls, error), out, block_size=4)

    part = sweep.open_results(out)
    done = part["done"].values
    assert done.sum() == [0, 4, 14][[0, 1, 4].index(calls)]
    assert np.array_equal(part["throws"].values[done], dice["throws"].values[done])
    assert (part["throws"].values[~done] == -1).all()
    assert np.isnan(part["mean"].values[~done]).all()

    before = snapshot(out)
    again = broken_after(6 - calls, RuntimeError)  # one more call would raise
    assert_same(dice, run(again, out, block_size=7))
    after = snapshot(out)
    assert all(after[p] == b for p, b in before.items())  # finished tasks were not redone


def test_a_resumed_store_keeps_its_block_size(tmp_path):
    """So results that depend on how replicates are grouped survive an interruption to the bit."""

    def simulate(self, config, key, replicates):
        results = dict(Dice.simulate(self, config, key, replicates))
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(replicates))
        return results | {"mean": np.full(len(replicates), len(replicates), np.float32)}

    calls = [0] * 3
    whole = run(_with(simulate=simulate), block_size=4)
    assert whole["mean"].values[0].tolist() == [4] * 8 + [2] * 2
    calls = []
    with pytest.raises(KeyboardInterrupt):
        run(_with(simulate=simulate), tmp_path / "a.zarr", block_size=4)
    calls = [0] * 3
    assert_same(whole, run(_with(simulate=simulate), tmp_path / "a.zarr", block_size=7))


def test_a_task_killed_before_its_done_mark_is_computed_again(dice, tmp_path):
    out = tmp_path / "a.zarr"
    run(Dice(), out, block_size=5)
    marks = sorted(p for p in (out / "done" / "c").rglob("*") if p.is_file())
    marks[1].unlink()
    torn = next(p for p in (out / "throws" / "c" / "0").rglob("*") if p.is_file())
    torn.unlink()
    assert sweep.open_results(out)["done"].values.sum() == 15
    marks[0].unlink()
    assert_same(dice, run(Dice(), out))


def test_a_task_is_marked_as_done_after_its_results_are_written(dice, tmp_path, monkeypatch):
    write = zarr.Array.__setitem__

    def fail(array, index, values):
        if array.basename == "mean":
            raise OSError("disk full")
        write(array, index, values)

    monkeypatch.setattr(zarr.Array, "__setitem__", fail)
    with pytest.raises(OSError, match="disk full"):
        run(Dice(), tmp_path / "a.zarr")
    monkeypatch.undo()
    assert not sweep.open_results(tmp_path / "a.zarr")["done"].values.any()
    assert_same(dice, run(Dice(), tmp_path / "a.zarr"))


def test_a_finished_run_is_not_computed_again(dice, tmp_path):
    run(Dice(), tmp_path / "a.zarr")
    assert_same(dice, run(broken_after(0, AssertionError), tmp_path / "a.zarr"))


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        (Dice(seed=3), "seed: stored 0, asked 3"),
        (Dice(sides=(2, 4)), r"sides: stored \[2, 6\], asked \[2, 4\]"),
        (Dice(num_replicates=11), "num_replicates: stored 10, asked 11"),
    ],
)
def test_results_of_another_run_are_refused_and_the_difference_shown(tmp_path, other, shown):
    out = tmp_path / "a.zarr"
    run(Dice(), out)
    before = snapshot(out)
    with pytest.raises(ValueError, match=shown):
        run(other, out)
    assert snapshot(out) == before
    fresh = run(other, out, resume=False)
    assert_same(fresh, run(other))
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]  # nothing left beside it


@pytest.mark.parametrize("key", ["attnmarkov", "jax", "backend", "fingerprint"])
def test_results_of_another_version_are_refused(tmp_path, key):
    run(Dice(), tmp_path / "a.zarr")
    meta = tmp_path / "a.zarr" / "zarr.json"
    content = json.loads(meta.read_text())
    content["attributes"][key] = "0.0"
    meta.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{key}: stored '0.0', asked"):
        run(Dice(), tmp_path / "a.zarr")


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, resume):
    for name, content in (("thesis.tex", "precious"), ("zarr.json", '{"attributes": {}}')):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=f"out: {folder} exists and holds no results"):
            run(Dice(), folder, resume=resume)
        assert snapshot(folder) == {folder / name: content.encode()}
        with pytest.raises(ValueError, match="out: "):
            run(Dice(), folder / name, resume=resume)
        with pytest.raises(ValueError, match="no results of a sweep"):
            sweep.open_results(folder)


def test_an_empty_folder_is_used(dice, tmp_path):
    (tmp_path / "a").mkdir()
    assert_same(dice, run(Dice(), tmp_path / "a"))


def test_an_unwritable_folder_is_found_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "below" / "a.zarr"
    with pytest.raises(ValueError, match=f"out: cannot write to {out}"):
        run(broken_after(0, AssertionError), out)


@pytest.mark.parametrize("found", [True, False])
def test_a_read_only_folder_is_found_before_anything_is_computed(tmp_path, monkeypatch, found):
    out = tmp_path / "a.zarr"
    if found:
        run(Dice(), out)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=f"out: cannot write to {out} .*Permission denied"):
        run(broken_after(0, AssertionError), out)


def test_a_failure_while_the_store_is_made_leaves_nothing(tmp_path):
    class Clash(Dice):
        def coords(self):
            return {}

    with pytest.raises(ValueError, match="coords: no coordinate for dim 'step' of 'throws'"):
        run(Clash(), tmp_path / "a.zarr")
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown executor 'spark'; known: serial"):
        run(Dice(), executor="spark")
    with pytest.raises(ValueError, match="block_size: must be at least 1, got 0"):
        run(Dice(), block_size=0)
    with pytest.raises(ValueError, match="num_replicates: must be at least 1, got -4"):
        Dice(num_replicates=-4)
    with pytest.raises(ValueError, match="seed: must be below"):
        Dice(seed=2**32)
    with pytest.raises(ValueError, match="preset: unknown preset 'slow'"):
        Dice.preset("slow")
    with pytest.raises(ValueError, match="the grid is empty"):
        run(_with(configs=lambda self: []))
    with pytest.raises(ValueError, match="points 0 and 1 have the same id"):
        run(Dice(sides=(6, 6)))
    with pytest.raises(ValueError, match="point 1 has other parameters"):
        run(_with(configs=lambda self: [{"a": 1}, {"b": 1}]))
    with pytest.raises(ValueError, match="parameter 'step' has the name of"):
        run(_with(configs=lambda self: [{"step": 1}]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"mean": r["mean"]}, "simulate: returned .*, layout has"),
        (lambda r: r | {"mean": r["throws"]}, r"'mean' has shape \(10, 3\), not \(10,\)"),
        (lambda r: r | {"throws": r["throws"] * 1.0}, "'throws' is float32, not int32"),
        (lambda r: r | {"throws": np.int64(r["throws"])}, "'throws' is int64, not int32"),
    ],
)
def test_results_that_break_the_layout_are_refused(change, message):
    def simulate(self, config, key, replicates):
        return change(Dice.simulate(self, config, key, replicates))

    with pytest.raises(ValueError, match=message):
        run(_with(simulate=simulate))


def test_progress_goes_to_stderr(capsys):
    sweep.run(Dice())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "dice" in captured.err


def test_claims_become_plain_json():
    claim = Claim("e", "c", "s", np.float32(0.5), np.nan, None, "inconclusive")
    assert json.loads(json.dumps(claim.to_json(), allow_nan=False)) == {
        "experiment": "e",
        "claim": "c",
        "source": "s",
        "predicted": 0.5,
        "measured": None,
        "uncertainty": None,
        "verdict": "inconclusive",
    }
    with pytest.raises(ValueError, match="unknown verdict 'maybe'"):
        dataclasses.replace(claim, verdict="maybe")


def _with(**methods) -> Dice:
    return type("Changed", (Dice,), methods)()
