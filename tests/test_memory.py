"""Histories as stepping engines carry them, over more steps than a law test can run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnmarkov as am
from attnmarkov.rollout._layout import LaneMajor, TokenMajor
from attnmarkov.rollout._memory import Decay


@pytest.mark.parametrize("layout", [TokenMajor(2), LaneMajor(2)])
@pytest.mark.parametrize("gamma", [1.0, 1 - 1e-6, 1 - 1e-4, 0.9, 0.5])
def test_long_memories_keep_counting(layout, gamma):
    # Token 0 comes at every step but each hundredth, where token 1 comes.
    memory = Decay(am.DecayContext(gamma), layout)
    prompt = am.Prompts.from_tokens([[0, 1]], 2)
    steps = 3_000_000

    @jax.jit
    def run():
        def push(t, state):
            return memory.push(state, jnp.where(t % 100 == 99, 1, 0)[None], t)

        state = jax.lax.fori_loop(0, steps, push, memory.start(prompt))
        return layout.rows(jnp.exp(memory.log_n(state, jnp.zeros(0), jnp.uint32(steps))))[0, :2]

    slope = float(memory._slope())  # as float32 has it
    lag = np.arange(steps + 2)
    at = (steps - 1 - lag) % 100 == 99
    at[-2:] = [True, False]  # the prompt
    weight = np.exp(slope * lag)
    expected = [weight[~at].sum(), weight[at].sum()]
    np.testing.assert_allclose(run(), expected, rtol=3e-6)
