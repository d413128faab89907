"""The experiment of the coverage threshold: what it simulates, and what it would fail."""

from __future__ import annotations

import dataclasses

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnmarkov import sweep
from attnmarkov.experiments import coverage_threshold
from attnmarkov.experiments.coverage_threshold import CoverageThreshold

SMALL = CoverageThreshold(
    num_tokens=3,
    bridges=(0.0, 0.5),
    num_prompts=(400, 800, 1600),
    num_replicates=40,
    num_teachers=2,
    num_test_prompts=256,
    length=6,
)


@pytest.fixture(scope="module")
def results():
    return sweep.run(SMALL, None, progress=False)


def test_claims_and_figure(results):
    claims = SMALL.claims(results)
    assert len(claims) == 2 * 3 + 1
    assert [c.verdict for c in claims].count("fail") == 0
    assert [c.measured for c in claims if "share of fits" in c.claim] == [1.0, 1.0]
    figure = SMALL.figures(results)["coverage-threshold"]
    assert "floor" in str(figure.get_label())
    assert len(figure.axes) == 2


def test_without_a_bridge_two_contrasts_are_lost_and_the_rest_is_not(results):
    split = SMALL.bridge(results, 0.0)
    assert (split["num_identifiable"] == 4).all()
    np.testing.assert_array_equal(split["connected"][0, 0], [False, True, False])
    lost = split["lost"].values
    assert (lost[..., 1] < 1e-9).all()  # the middle row learns what never meets
    assert (lost[..., [0, 2]] > 0.005).all()
    error, within = split["squared_error"].values, split["identified_error"].values
    np.testing.assert_allclose(error, within + lost, rtol=1e-4, atol=1e-5)  # Pythagoras
    whole = SMALL.bridge(results, 0.5)
    assert (whole["num_identifiable"] == 6).all()
    assert (whole["lost"] < 1e-9).all()
    assert (whole["floor"] < 1e-9).all()


@pytest.mark.parametrize("factor", [1.0, 1.2])
@pytest.mark.parametrize(
    ("name", "predicted", "text"),
    [
        ("identified_error", "predicted_error", "tr(I⁺)/n"),
        ("excess_risk", "predicted_risk", "tr(J I⁺)/2n"),
        ("excess_risk", "floor", "floor"),
    ],
)
def test_only_wrong_errors_fail(results, name, predicted, text, factor):
    made = results.copy(deep=True)
    noise = oracle.generator("noise").normal(1, 0.01, made[name].shape)
    made[name] = factor * made[predicted] * noise
    found = [c.verdict for c in SMALL.claims(made) if text in c.claim]
    assert found
    assert set(found) == {"pass" if factor == 1 else "fail"}


def test_a_graph_that_misjudges_fails(results):
    wrong = results.copy(deep=True)
    wrong["num_identifiable"][0, 0] = 6
    assert "fail" in {c.verdict for c in SMALL.claims(wrong) if "share of fits" in c.claim}
    wrong = results.copy(deep=True)
    rows = wrong["connected"].values[-1]
    wrong["squared_error"].values[-1][rows] = 9.0
    random = SMALL.claims(wrong)[-1]
    assert random.verdict == "fail"
    assert random.measured == rows.sum()


def test_spoilt_fits_get_no_verdict(results):
    spoilt = results.copy(deep=True)
    spoilt["status"][:, :10] = 2
    claims = SMALL.claims(spoilt)
    assert {c.verdict for c in claims if "as n grows" in c.claim} == {"inconclusive"}
    assert "25.0% of fits without a maximum" in claims[0].claim


def test_replicates_do_not_depend_on_their_block(results):
    config = SMALL.configs()[-1]
    part = SMALL.simulate(config, SMALL.config_key(config), np.array([7, 3]))
    whole = results.isel(config=-1, replicate=[7, 3])
    for name, values in part.items():
        np.testing.assert_allclose(values, whole[name].values, rtol=2e-4, atol=1e-5)


def test_random_supports_hold_two_to_all_but_one_token():
    held = np.asarray(
        coverage_threshold._random_supports(oracle.key_of("supports"), jnp.arange(2000), 2, 5)
    )
    size = held.sum(-1)
    assert size.min() == 2
    assert size.max() == 4
    n = size.size
    for value in (2, 3, 4):  # 5 standard errors: fails once in a million
        assert abs((size == value).mean() - 1 / 3) < 5 * np.sqrt(2 / 9 / n)
    share = held.mean((0, 1))
    assert abs(share - 3 / 5).max() < 5 * np.sqrt(0.24 / n)


def test_prompts_follow_their_supports():
    """Rows are connected exactly as the graph of the supports that hold them."""
    seed = jax.random.key(0)
    random = dataclasses.replace(SMALL, num_tokens=5, num_supports=3, num_replicates=30)
    config = random.configs()[-1]
    ids = np.arange(30)
    found = random.simulate(config, random.config_key(config), ids)["connected"]
    supports = np.asarray(coverage_threshold._random_supports(seed, jnp.asarray(ids), 3, 5))
    for r in ids:
        for k in range(5):  # 1600 prompts of 6 tokens show every pair of a support
            of_row = supports[r][supports[r][:, k]]
            assert found[r, k] == (len(of_row) > 0 and of_row.any(0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 2}, "num_tokens: .* at least 3, got 2"),
        ({"bridges": (0.1, 0.5)}, "bridges: expected 0 and probabilities"),
        ({"bridges": (0.0, 1.5)}, "bridges"),
        ({"num_prompts": (10, 20)}, "num_prompts: expected three or more"),
        ({"length": 1}, "length"),
        ({"concentration": 0.0}, "concentration"),
        ({"num_supports": 0}, "num_supports: must be at least 1, got 0"),
    ],
)
def test_bad_parameters(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
