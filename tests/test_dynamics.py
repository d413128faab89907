import numpy as np
import pytest

import attnmarkov as am


def test_exponents_and_possible_winners():
    p = np.array([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.1, 0.3, 0.6]])
    model = am.CCMC.from_transition_matrix(p)
    for w in range(3):
        np.testing.assert_allclose(
            am.dynamics.winner_exponents(model, w), p[w] / p[w, w], rtol=1e-5
        )
    assert am.dynamics.possible_winners(model).tolist() == [True, False, True]


def test_ties_and_zeros():
    model = am.CCMC.from_transition_matrix([[0.5, 0.5], [1.0, 0.0]])
    assert am.dynamics.possible_winners(model).tolist() == [False, False]
    assert am.dynamics.winner_exponents(model, 1)[0] == np.inf


def test_bad_winner():
    model = am.CCMC.from_transition_matrix(np.eye(2))
    with pytest.raises(ValueError, match=r"winner: 2 is outside 0..1"):
        am.dynamics.winner_exponents(model, 2)
