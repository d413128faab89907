"""Equilibria by supports, held against searches and theorems that do not use them."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnmarkov as am
from attnmarkov.dynamics import drift, equilibria, growth_exponents, mean_field


def drifts(p, m, a=1.0):
    """``ν(m) − m`` in float64, batched: (n, s, s) and (n, s); ν by a least-squares solve."""
    weight = m[:, None, :] ** a * p
    law = weight / weight.sum(axis=2, keepdims=True)
    size = m.shape[1]
    nu = np.linalg.solve(np.swapaxes(np.eye(size) - law, 1, 2) + 1, np.ones((*m.shape, 1)))
    return nu[..., 0] - m


def differences(p, m, a=1.0, step=1e-6):
    """(n, s, s) derivative of the drift by central differences in each share."""
    size = m.shape[1]
    columns = []
    for j in range(size):
        e = step * m[:, j : j + 1] * np.eye(size)[j]
        columns.append((drifts(p, m + e, a) - drifts(p, m - e, a)) / (2 * step * m[:, j : j + 1]))
    return np.stack(columns, axis=-1)


def search(p, rng, starts=12, steps=40):
    """Interior zeros of the drift on (n, s, s) blocks, by Newton's method from random starts.

    Works on the drift itself, with differences: nothing of the linear system is used.
    """
    n, s, _ = p.shape
    owner = np.repeat(np.arange(n), starts)
    m = rng.dirichlet(np.full(s, 0.5), n * starts) * 0.9999 + 0.0001 / s
    alive = np.arange(len(m))
    for _ in range(steps):
        block = p[owner[alive]]
        f = drifts(block, m[alive])
        # Along vectors that sum to 0 alone: the last share gives way.
        jac = differences(block, m[alive])
        jac = jac[:, :-1, :-1] - jac[:, :-1, -1:]
        delta = -np.linalg.solve(jac + 1e-13 * np.eye(s - 1), f[:, :-1, None])[..., 0]
        delta = np.column_stack([delta, -delta.sum(axis=1)])
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(delta < 0, -m[alive] / delta, np.inf).min(axis=1)
        m[alive] += delta * np.minimum(1, 0.7 * room)[:, None]
        done = (abs(f).max(axis=1) < 1e-13) | (m[alive].min(axis=1) < 1e-9)
        alive = alive[~done]
        if len(alive) == 0:
            break
    good = (abs(drifts(p[owner], m)).max(axis=1) < 1e-10) & (m.min(axis=1) > 1e-6)
    return owner[good], m[good]


@pytest.fixture(scope="module")
def thousand():
    rng = np.random.default_rng(7)
    out = []
    for i in range(1000):
        size = 2 + i % 4
        model = am.CCMC.from_transition_matrix(rng.dirichlet(np.ones(size), size))
        logits = np.asarray(model.logits, float)
        p = np.exp(logits)
        out.append((p / p.sum(axis=1, keepdims=True), equilibria(model)))
    return out


def test_every_one_listed_is_an_equilibrium(thousand):
    for p, found in thousand:
        assert found.complete
        assert len({e.support for e in found}) == len(found)
        assert all(found.at(w)[0].occupancy[w] == 1 for w in range(len(p)))
        for e in found:
            ids = list(e.support)
            m = e.occupancy
            assert abs(m.sum() - 1) < 1e-12
            assert (m[ids] > 0).all()
            assert (np.delete(m, ids) == 0).all()
            residual = drifts(p[np.ix_(ids, ids)][None], m[None, ids])
            np.testing.assert_allclose(residual, 0, atol=1e-10)
            pull = p @ m
            np.testing.assert_allclose(e.growth_exponents, (m / pull) @ p, rtol=1e-7)


def test_a_search_finds_no_other(thousand):
    """Newton's method on every face of every matrix: what it finds is listed, and is most of it."""
    rng = np.random.default_rng(8)
    seen = listed = 0
    for s in (2, 3, 4, 5):
        cases = [
            (i, ids)
            for i, (p, _) in enumerate(thousand)
            for ids in itertools.combinations(range(len(p)), s)
        ]
        blocks = np.array([thousand[i][0][np.ix_(ids, ids)] for i, ids in cases])
        owner, shares = search(blocks, rng)
        for number in np.unique(owner):
            i, ids = cases[number]
            known = thousand[i][1].at(ids)
            assert len(known) == 1, (i, ids, shares[owner == number])
            for m in shares[owner == number]:
                np.testing.assert_allclose(m, known[0].occupancy[list(ids)], atol=1e-5)
        seen += len(np.unique(owner))
        listed += sum(len(e.support) == s for _, found in thousand for e in found)
    assert seen > 0.97 * listed


def test_index_theorem(thousand):
    """Indices of the equilibria that no absent token can invade sum to 1 (Hofbauer 1990).

    One that is missing, or has a wrong eigenvalue, spoils the sum.
    """
    for p, found in thousand:
        total = 0
        for e in found:
            inner = e.jacobian_eigenvalues[: len(e.support) - 1]
            outer = e.jacobian_eigenvalues[len(e.support) - 1 :].real
            assert abs(e.jacobian_eigenvalues).min() > 1e-6
            if (outer < 0).all():
                total += np.sign(np.prod(-inner).real)
        assert total == 1, p


def test_eigenvalues_against_differences(thousand):
    rng = np.random.default_rng(9)
    checked = 0
    for i in rng.permutation(1000)[:150]:
        p, found = thousand[i]
        for e in found:
            s = len(e.support)
            if s == 1:
                continue
            ids = list(e.support)
            jac = differences(p[np.ix_(ids, ids)][None], e.occupancy[None, ids])[0]
            basis = np.linalg.svd(np.ones((1, s)))[2][1:]
            want = np.linalg.eigvals(basis @ jac @ basis.T)
            for value in e.jacobian_eigenvalues[: s - 1]:
                assert abs(want - value).min() < 1e-4 * (1 + abs(value)) / min(e.occupancy[ids])
            outer = np.delete(e.growth_exponents, ids) - 1
            np.testing.assert_allclose(e.jacobian_eigenvalues[s - 1 :], outer)
            stable = (want.real < 0).all() and (outer < 0).all()
            assert e.stable == stable
            assert e.is_winner_set == (stable and s < len(p))
            checked += 1
    assert checked > 200


def test_the_flow_goes_to_stable_ones_and_leaves_others(thousand):
    for p, found in [t for t in thousand if len(t[0]) == 4][:3]:
        model = am.CCMC.from_transition_matrix(p)
        points = np.resize([e.occupancy for e in found], (12, 4))  # one shape: compiled once
        starts = 0.99 * points + 0.01 / 4
        ends = np.asarray(mean_field(model, starts, at=[400.0]).shares[:, -1])
        clear = [abs(e.relaxation_rate) > 0.05 for e in found]
        for e, end, known in zip(found, ends, clear, strict=False):
            if not known:
                continue
            stays = abs(end - e.occupancy).max() < 1e-3
            assert stays == e.stable, (e, end)
        grown = growth_exponents(model, points)
        np.testing.assert_allclose(
            grown[: len(found)], [e.growth_exponents for e in found], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(drift(model, points), 0, atol=2e-6)


PAIR = np.array([[0.2, 0.6, 0.2], [0.6, 0.2, 0.2], [0.3, 0.3, 0.4]])


def test_a_winner_set_of_two():
    found = equilibria(am.CCMC.from_transition_matrix(PAIR))
    assert found.winner_sets == ((2,), (0, 1))
    pair = found.at((0, 1))[0]
    np.testing.assert_allclose(pair.occupancy, [0.5, 0.5, 0], atol=1e-7)
    np.testing.assert_allclose(pair.growth_exponents, [1, 1, 0.5], rtol=1e-6)
    # The reversible chain inside has second eigenvalue 0.2 - 0.6: J = 1 + θ - 1.
    np.testing.assert_allclose(pair.jacobian_eigenvalues, [-0.5, -0.5], atol=1e-6)
    assert pair.relaxation_rate == pytest.approx(0.5, abs=1e-6)
    assert "{0, 1}" in repr(found)
    assert "stable, winner set" in repr(found)
    assert "3 tokens, 2 stable; complete" in repr(found)
    assert repr(pair).startswith("Equilibrium(support=(0, 1), stable, winner set")
    assert found[0].support == (2,)
    assert [e.support for e in found[:2]] == [(2,), (0, 1)]


def test_equal_rows():
    """Pólya's urn keeps any shares; with unequal weights only single tokens are left."""
    urn = equilibria(am.CCMC.from_transition_matrix(np.full((3, 3), 1 / 3)))
    assert {e.support: e.dimension for e in urn} == {
        **{(i,): 0 for i in range(3)},
        **dict.fromkeys(itertools.combinations(range(3), 2), 1),
        (0, 1, 2): 2,
    }
    assert not any(e.stable or e.is_winner_set for e in urn)
    assert "one of a continuum (dimension 2)" in repr(urn)
    assert "neutral" in repr(urn)
    unequal = equilibria(am.CCMC.from_transition_matrix([[0.5, 0.3, 0.2]] * 3))
    assert [e.support for e in unequal] == [(0,), (1,), (2,)]
    assert unequal.winner_sets == ((0,),)


def test_a_continuum_whose_smallest_solution_is_not_positive():
    """Rows with r0 + r1 = r2 + r3: the solution of least norm has a negative entry, others none."""
    r0, r2 = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.3, 0.3, 0.2, 0.2])
    r1 = (2 - r0) / 7  # so that x = (1, 13, 1, 1) / 4 solves it
    p = np.stack([r0, r1, r2, r0 + r1 - r2])
    np.testing.assert_allclose(np.array([1, 13, 1, 1]) / 4 @ p, 1)
    assert np.linalg.lstsq(p.T, np.ones(4), rcond=1e-9)[0].min() < -0.1
    found = equilibria(am.CCMC.from_transition_matrix(p)).at(range(4))[0]
    assert found.dimension == 1
    assert not found.isolated
    assert not found.stable
    np.testing.assert_allclose(drifts(p[None], found.occupancy[None]), 0, atol=1e-6)


def test_masked_tokens():
    cycle = equilibria(am.CCMC.from_transition_matrix([[0, 1.0], [1, 0]]))
    assert [(e.support, e.stable) for e in cycle] == [((0, 1), True)]
    apart = equilibria(am.CCMC.from_transition_matrix(np.eye(2)))
    assert [(e.support, e.stable) for e in apart] == [((0,), True), ((1,), True)]
    # Token 1 does not attend token 0: how it grows beside it linearisation does not tell.
    p = [[0.7, 0.2, 0.1], [0, 0.5, 0.5], [0.3, 0.3, 0.4]]
    winner = equilibria(am.CCMC.from_transition_matrix(p)).at(0)[0]
    assert np.isnan(winner.growth_exponents[1])
    assert not winner.stable
    one = equilibria(am.CCMC.from_transition_matrix([[1.0]]))
    assert [(e.support, e.stable, e.is_winner_set) for e in one] == [((0,), True, False)]
    assert one[0].relaxation_rate == np.inf


def test_rows_of_very_different_scale():
    """Rare tokens are not mistaken for a singular matrix, nor the other way round."""
    p = np.array([[1e-9, 2e-9, 1 - 3e-9], [3e-9, 1e-9, 1 - 4e-9], [0.2, 0.2, 0.6]])
    pair = equilibria(am.CCMC.from_transition_matrix(p)).at((0, 1))[0]
    assert pair.isolated
    np.testing.assert_allclose(drifts(p[None, :2, :2], pair.occupancy[None, :2]), 0, atol=1e-6)
    nearly = equilibria(am.CCMC.from_transition_matrix([[0.5, 0.5], [0.5 + 1e-9, 0.5 - 1e-9]]))
    assert not nearly.at((0, 1))[0].isolated


@pytest.mark.parametrize("power", [0.6, 1.7])
def test_other_powers(power):
    """Each is an equilibrium with the eigenvalues that differences give."""
    rng = np.random.default_rng(4)
    stable = 0
    for _ in range(5):
        p = rng.dirichlet(np.ones(3), 3)
        model = am.CCMC.from_transition_matrix(p)
        found = equilibria(model, exponent=power)
        same = equilibria(model, exponent=2 * power, temperature=2.0)
        assert not found.complete
        assert "there may be others" in repr(found)
        assert len(same) > 0
        for w in range(3):
            assert found.at(w)[0].stable == (power > 1)
        for e in found:
            ids = list(e.support)
            if len(ids) == 1:
                continue
            m, block = e.occupancy[None, ids], p[np.ix_(ids, ids)][None]
            np.testing.assert_allclose(drifts(block, m, power), 0, atol=3e-7)
            jac = differences(block, m, power)[0]
            basis = np.linalg.svd(np.ones((1, len(ids))))[2][1:]
            want = np.linalg.eigvals(basis @ jac @ basis.T)
            inner = e.jacobian_eigenvalues[: len(ids) - 1]
            np.testing.assert_allclose(np.sort(np.real(want)), np.sort(np.real(inner)), atol=1e-3)
            stable += e.stable
        if power < 1:
            assert all(len(e.support) == 3 for e in found.stable)
            assert len(found.stable) >= 1
    assert stable > 0


def test_many_tokens_by_the_flow():
    """A winner set of five planted among 16 tokens is found, and all listed are equilibria."""
    rng = np.random.default_rng(11)
    p = rng.uniform(0.1, 0.3, (16, 16))
    np.fill_diagonal(p, 0.15)
    ring = [2, 5, 7, 11, 14]
    for k in ring:
        p[k, ring] = 1.0
        p[k, k] = 0.05
    p /= p.sum(axis=1, keepdims=True)
    found = equilibria(am.CCMC.from_transition_matrix(p), num_starts=64)
    assert not found.complete
    assert tuple(ring) in found.winner_sets
    assert len({e.support for e in found}) == len(found)
    for e in found:
        ids = list(e.support)
        residual = drifts(p[np.ix_(ids, ids)][None], e.occupancy[None, ids])
        np.testing.assert_allclose(residual, 0, atol=1e-6)
    again = equilibria(am.CCMC.from_transition_matrix(p), num_starts=64)
    assert [e.support for e in again] == [e.support for e in found]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_starts": 0}, "num_starts: must be at least 1, got 0"),
        ({"seed": -1}, "seed: must be at least 0, got -1"),
        ({"temperature": -1.0}, "temperature: must be positive and finite, got -1"),
        ({"exponent": "x"}, "exponent: expected a number, got 'x'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        equilibria(am.CCMC.from_transition_matrix(PAIR), **change)


def test_powers_of_one_but_for_rounding():
    """0.1 + 0.2 is not 0.3: the power is 1 all the same, everywhere."""
    odd = {"exponent": 0.1 + 0.2, "temperature": 0.3}
    model = am.CCMC.from_transition_matrix([[0.6, 0.4], [0.7, 0.3]])
    found = equilibria(model, exponent=0.1 + 0.2, temperature=0.3)
    assert found.complete
    assert found.winner_sets == ((0,),)
    phases = am.dynamics.two_token_phases(0.4, 0.7, **odd)
    assert phases.power == 1
    assert int(phases.regime) == 0
    growth = np.asarray(growth_exponents(model, [1.0, 0.0], **odd))
    np.testing.assert_allclose(growth, [1, (0.4 / 0.6) ** (1 / 0.3)], rtol=1e-5)


def test_low_temperatures_mask_nothing():
    """Entries of Q that underflow are not masked: the same as two tokens in closed form."""
    cases = [(0.9999, 0.5, 1.0, 0.01), (0.7, 0.6, 1e-3, 1e-3), (0.1, 0.1, 0.05, 0.05)]
    cases += [(0.9, 0.8, 0.002, 0.002), (0.03, 0.01, 0.01, 0.01), (0.4, 0.3, 1e6, 1.0)]
    for p, q, exponent, temperature in cases:
        model = am.CCMC.from_transition_matrix([[1 - p, p], [q, 1 - q]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = equilibria(model, exponent=exponent, temperature=temperature)
            one = am.dynamics.two_token_phases(p, q, exponent=exponent, temperature=temperature)
        assert [found.at(w)[0].stable for w in (0, 1)] == one.can_win.tolist()
        both = found.at((0, 1))
        assert [e.stable for e in both] == one.stable[: len(both)].tolist()
        if exponent == temperature:
            np.testing.assert_allclose(both[0].occupancy[0], one.shares[0], rtol=1e-3)
            assert not found.complete or p in (0.1, 0.03)
    chain = am.CCMC.from_transition_matrix(
        [[0.98, 0.01, 0.01], [0.02, 0.97, 0.01], [0.01, 0.01, 0.98]]
    )
    assert len(equilibria(chain, exponent=0.02, temperature=0.02)) > 2  # hardly a link: no error


def test_twin_tokens_win_together():
    """Tokens 0 and 1 have the same row: they share what they win as an urn does."""
    p = [[0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.2, 0.2, 0.6]]
    found = equilibria(am.CCMC.from_transition_matrix(p))
    assert found.winner_sets == ((2,), (0, 1))
    twins = found.at((0, 1))[0]
    assert twins.dimension == 1
    assert twins.attracting
    assert twins.is_winner_set
    assert not twins.stable
    assert "attracting, winner set; one of a continuum (dimension 1)" in repr(twins)
    assert not found.at((0, 1, 2))[0].attracting  # unstable across
    left = equilibria(
        am.CCMC.from_transition_matrix([[0.3, 0.3, 0.4], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]])
    )
    assert left.winner_sets == ((2,),)


def test_models_that_are_no_plain_matrix():
    """Self-attention will do; NaN logits and traced models are named."""
    rng = np.random.default_rng(0)
    attention = am.SelfAttention.from_weights(rng.normal(size=(3, 3)), rng.normal(size=(3, 3)))
    same, plain = equilibria(attention), equilibria(attention.to_ccmc())
    assert [e.support for e in same] == [e.support for e in plain]
    np.testing.assert_array_equal(
        growth_exponents(attention, [1, 2, 3]), growth_exponents(attention.to_ccmc(), [1, 2, 3])
    )
    assert mean_field(attention, [1, 2, 3], 1.0, 2).shares.shape == (1, 2, 3)
    with pytest.raises(ValueError, match=r"model.logits: entry \[0, 1\] is nan"):
        equilibria(am.CCMC(jnp.array([[0, jnp.nan], [0, 0]])))
    with pytest.raises(ValueError, match="model: equilibria are found on the host"):
        jax.jit(lambda m: equilibria(m)[0].occupancy)(attention.to_ccmc())
    bad: Any = np.eye(2)
    with pytest.raises(ValueError, match="model: expected a CCMC or a SelfAttention, got ndarray"):
        equilibria(bad)
