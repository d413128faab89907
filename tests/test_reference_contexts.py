from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from law_cases import CONTEXTS, DECODERS, NUM_STEPS, PROMPTS, P
from oracles import assert_law, greedy, trajectory_law

import attnmarkov as am
from attnmarkov import _random
from attnmarkov.model import (
    DecayContext,
    FullContext,
    Greedy,
    LagContext,
    PositionContext,
    Sampling,
    WindowContext,
)
from attnmarkov.rollout import Reference, reference
from attnmarkov.rollout.law import Law

RUNS = 30_000
LOGITS = am.CCMC.from_transition_matrix(P).logits


def seeds_of(key, lanes):
    return _random.replicate_seeds(key, jnp.arange(lanes), "rollout")


def sampled(key, law, prompt, num_steps, runs=RUNS):
    """(runs, num_steps) tokens after each of the prompts: a list of as many arrays."""
    lanes = prompt[np.repeat(np.arange(len(prompt)), runs)]
    drawn = Reference().tokens(law, seeds_of(key, len(lanes)), lanes, num_steps)
    return np.split(np.asarray(drawn), len(prompt))


@pytest.mark.parametrize(("decoder", "decoding"), DECODERS)
@pytest.mark.parametrize(("context", "weighing"), CONTEXTS)
def test_law_of_short_trajectories(key, context, weighing, decoder, decoding):
    prompts = am.Prompts.from_tokens(PROMPTS, 3)
    drawn = sampled(key, Law(LOGITS, context, decoder), prompts, NUM_STEPS)
    for prompt, tokens in zip(PROMPTS, drawn, strict=True):
        assert_law(tokens, trajectory_law(P, prompt, NUM_STEPS, **weighing, **decoding))


@pytest.mark.parametrize("exponent", [1.0, 1.4])
def test_a_query_given_apart_steers_the_first_step_only(key, exponent):
    prompts = am.Prompts.from_tokens([[0, 1, 1]], 3, query=[2])
    law = Law(LOGITS, DecayContext(0.5, exponent=exponent), Sampling())
    (tokens,) = sampled(key, law, prompts, 3)
    weighing = {"weight": lambda i, length, query: 0.5 ** (length - 1 - i), "exponent": exponent}
    assert_law(tokens, trajectory_law(P, [0, 1, 1], 3, **weighing, query=2))


@pytest.mark.parametrize("plain", [True, False])
def test_traced_parameters_have_the_same_law(key, plain):
    # Seen from outside, gamma = 0.4 is traced; so is the exponent where the law is not plain.
    prompts = am.Prompts.from_tokens([PROMPTS[0]] * RUNS, 3)
    seeds = seeds_of(key, RUNS)

    @jax.jit
    def tokens(gamma, exponent):
        context = DecayContext(gamma, exponent=1.0 if plain else exponent)
        law = Law(LOGITS, context, Sampling())
        assert law.is_plain == plain
        return Reference().tokens(law, seeds, prompts, 3)

    drawn = np.asarray(tokens(0.4, 1.0))
    law = trajectory_law(P, PROMPTS[0], 3, lambda i, length, query: 0.4 ** (length - 1 - i))
    assert_law(drawn, law)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_counts_only_prompts_with_the_full_context(key, exponent):
    prompts = am.Prompts.from_counts([[2, 0, 1]], [0])
    law = Law(LOGITS, FullContext(exponent=exponent), Sampling())
    (tokens,) = sampled(key, law, prompts, 2)
    assert_law(tokens, trajectory_law(P, [0, 2, 0], 2, exponent=exponent))


@pytest.mark.parametrize("context", [WindowContext(1), DecayContext(0.5, exponent=2.0)])
def test_counts_are_those_of_the_whole_history(key, context):
    prompts = am.Prompts.from_tokens(PROMPTS, 3)
    law, seeds = Law(LOGITS, context, Sampling()), seeds_of(key, 3)
    tokens = np.asarray(Reference().tokens(law, seeds, prompts, 140))
    at = np.array([0, 1, 5, 130, 140])
    counts = np.asarray(Reference().counts(law, seeds, prompts, at))
    for prompt, row, got in zip(PROMPTS, tokens, counts, strict=True):
        expected = [np.bincount([*prompt, *row[:t]], minlength=3) for t in at]
        np.testing.assert_array_equal(got, expected)
    if isinstance(context, WindowContext):  # nothing but the last token is ever seen
        np.testing.assert_array_equal(tokens, np.array([[2], [0], [0]]).repeat(140, 1))


def test_greedy_does_not_depend_on_the_key(key):
    prompts = am.Prompts.from_tokens([PROMPTS[0]] * 2, 3)
    law = Law(LOGITS, LagContext([1.0, 2.0, 0.5]), Greedy())
    a, b = np.asarray(Reference().tokens(law, seeds_of(key, 2), prompts, 200))
    np.testing.assert_array_equal(a, b)
    expected = trajectory_law(
        P,
        PROMPTS[0],
        200,
        weight=lambda i, length, query: {0: 1, 1: 2, 2: 0.5}.get(length - 1 - i, 0),
        decode=greedy,
    )
    assert tuple(a.tolist()) in expected


@pytest.mark.parametrize("decoder", [Sampling(), Sampling(0.5), Greedy()])
def test_a_lane_with_nothing_to_attend_emits_minus_one(key, decoder):
    # Lag 0 weighs nothing, so the prompt of one token is stuck and stays as it is.
    prompts = am.Prompts.from_tokens([[1], [1, 0]], 2)
    law = Law(jnp.zeros((2, 2)), LagContext([0.0, 1.0]), decoder)
    tokens = np.asarray(Reference().tokens(law, seeds_of(key, 2), prompts, 5))
    assert tokens.tolist() == [[-1] * 5, [1, 0, 1, 0, 1]]


@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_weights_beyond_float32(key, exponent):
    # The tokens of the history have log-weights near -1000, and scores 300 apart.
    bias = np.full((4, 4), -1000.0)
    bias[1] += 300 / exponent
    law = Law(
        jnp.array([[300.0, 0.0, 0.0]] * 3), PositionContext(bias, exponent=exponent), Sampling()
    )
    (tokens,) = sampled(key, law, am.Prompts.from_tokens([[0, 1]], 3), 1)
    assert_law(tokens, {(0,): 0.5, (1,): 0.5})


def test_compiles_once_for_other_parameters(key):
    prompts = am.Prompts.from_tokens(PROMPTS, 3)
    jitted: Any = reference._tokens
    jitted.clear_cache()
    for value in (0.2, 0.5, 0.9):
        context = DecayContext(value, exponent=value)
        decoder = Sampling(1 + value, int(10 * value), value)
        Reference().tokens(Law(value * LOGITS, context, decoder), seeds_of(key, 3), prompts, 7)
    assert jitted._cache_size() == 1


def test_maps_over_contexts_and_decoders(key):
    prompts = am.Prompts.from_tokens(PROMPTS, 3)
    seeds = seeds_of(key, 3)
    laws = [
        Law(LOGITS, DecayContext(gamma, exponent=1.5), Sampling(temperature))
        for gamma, temperature in ((0.3, 0.5), (0.9, 2.0))
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *laws)
    together = jax.vmap(lambda law: Reference().tokens(law, seeds, prompts, 30))(stacked)
    for row, law in zip(together, laws, strict=True):
        chex.assert_trees_all_equal(row, Reference().tokens(law, seeds, prompts, 30))


@pytest.mark.parametrize(
    ("context", "decoder", "plain"),
    [
        (FullContext(), Sampling(), True),
        (DecayContext(0.5, exponent=jnp.ones(())), Sampling(), True),
        (FullContext(exponent=0.5), Sampling(), False),
        (FullContext(), Sampling(0.5), False),
        (FullContext(), Greedy(), False),
    ],
)
def test_is_plain(context, decoder, plain):
    assert Law(LOGITS, context, decoder).is_plain is plain


@pytest.mark.parametrize(
    ("context", "prompts", "message"),
    [
        (
            WindowContext(3),
            am.Prompts.from_counts([[1, 1, 0]], [0]),
            "context: WindowContext weighs positions, so it needs token ids",
        ),
        (
            PositionContext(np.zeros((6, 6))),
            am.Prompts.from_tokens([[0, 1, 2], [0, 1, 1]], 3),
            "context: holds 6 positions, but the last draw is made from 7 tokens",
        ),
    ],
)
def test_bad_input(key, context, prompts, message):
    law = Law(LOGITS, context, Sampling())
    with pytest.raises(ValueError, match=message):
        Reference().tokens(law, seeds_of(key, len(prompts)), prompts, 5)
    with pytest.raises(ValueError, match=message):
        Reference().counts(law, seeds_of(key, len(prompts)), prompts, np.array([1, 5]))


def test_positions_may_be_used_up_to_the_last(key):
    prompts = am.Prompts.from_tokens([[0, 1, 2]], 3)
    law = Law(LOGITS, PositionContext(np.zeros((7, 7))), Sampling())
    assert (np.asarray(Reference().tokens(law, seeds_of(key, 1), prompts, 5)) >= 0).all()
