"""Every engine against enumerated laws, in float64, of every context and decoder that it takes."""

import jax
import numpy as np
import pytest
from engine_cases import EQUAL_ROWS, LANE_MAJOR, OBJECTS, keeping, record_of, sampled
from law_cases import CONTEXTS, DECODERS, NUM_STEPS, PROMPTS, P
from oracles import (
    FAILURE_RATE,
    assert_law,
    assert_poisson,
    context_law,
    hf_sampling,
    trajectory_law,
)
from scipy import stats

import attnmarkov as am
from attnmarkov.model import DecayContext, FullContext, Greedy, LagContext, Sampling, WindowContext
from attnmarkov.rollout import Scan, _layout

RUNS = 20_000


def window(size):
    return lambda i, length, query: float(length - 1 - i < size)


def pairs(engine):
    """Cases of ``law_cases`` that an engine takes: context, what is known of it, the same again."""
    for context in CONTEXTS:
        for decoder in DECODERS:
            if record_of(engine, 3, context.values[0], decoder.values[0]):
                label = f"{engine}-{context.id}-{decoder.id}"
                yield pytest.param(engine, *context.values, *decoder.values, id=label)


STEPPING = [e for e in OBJECTS if e != "reference" and e not in EQUAL_ROWS]
CASES = [case for engine in STEPPING for case in pairs(engine)]


def assert_laws(engine, p, key, prompts, num_steps, laws, runs=RUNS, query=None, **law):
    """Goodness of fit of ``runs`` trajectories after each of the prompts."""
    size = len(p)
    batch = am.Prompts.from_tokens(prompts, size, query=query)
    batch = batch[np.repeat(np.arange(len(prompts)), runs)]
    model = am.CCMC.from_transition_matrix(p)
    tokens = sampled(engine, model, key, batch, num_steps, len(batch), **law)
    for own, expected in zip(np.split(tokens, len(prompts)), laws, strict=True):
        assert_law(own, expected)


@pytest.mark.parametrize(("engine", "context", "weighing", "decoder", "decoding"), CASES)
def test_law_of_short_trajectories(key, engine, context, weighing, decoder, decoding):
    laws = [trajectory_law(P, prompt, NUM_STEPS, **weighing, **decoding) for prompt in PROMPTS]
    law = {"context": context, "decoder": decoder}
    assert_laws(engine, P, key, PROMPTS, NUM_STEPS, laws, **law)


@pytest.mark.parametrize("engine", [e for e in EQUAL_ROWS if e in OBJECTS])
def test_law_of_equal_rows(key, engine):
    p = [[0.2, 0.7, 0.1]] * 3
    laws = [trajectory_law(p, prompt, 3) for prompt in PROMPTS]
    assert_laws(engine, p, key, PROMPTS, 3, laws, 5000)


@pytest.mark.parametrize("context", [WindowContext(2), DecayContext(0.4), LagContext([1, 3])])
def test_a_query_given_apart_steers_the_first_step_only(key, context):
    weight = {
        WindowContext: window(2),
        DecayContext: lambda i, length, query: 0.4 ** (length - 1 - i),
        LagContext: lambda i, length, query: {0: 1.0, 1: 3.0}.get(length - 1 - i, 0.0),
    }[type(context)]
    law = trajectory_law(P, [0, 1, 1], 3, weight, query=2)
    assert_laws("scan", P, key, [[0, 1, 1]], 3, [law], query=[2], context=context)


# Larger vocabularies lie lane-major. First small ones laid out in the same way, so that
# all trajectories can be enumerated: rows of two slices, with columns drawn from columns.

P5 = np.random.default_rng(3).dirichlet(np.ones(5), 5).tolist()
PROMPTS5 = [[4, 0, 1, 3, 2], [3, 4, 4, 0], [1]]


LAID_OUT = [
    (FullContext(), Sampling(), {}),
    (FullContext(exponent=0.5), Sampling(), {"exponent": 0.5}),
    (FullContext(), Greedy(), {"decode": lambda law: np.eye(5)[np.argmax(law)]}),
    (WindowContext(3), Sampling(), {"weight": window(3)}),
    (
        WindowContext(3),
        Sampling(0.7, top_k=3, top_p=0.9),
        {"weight": window(3), "decode": hf_sampling(0.7, 3, 0.9)},
    ),
    (DecayContext(0.6), Sampling(), {"weight": lambda i, length, _: 0.6 ** (length - 1 - i)}),
    (
        DecayContext(0.3, exponent=1.5),
        Sampling(1.4),
        {
            "weight": lambda i, length, _: 0.3 ** (length - 1 - i),
            "exponent": 1.5,
            "decode": hf_sampling(1.4),
        },
    ),
    (
        LagContext([0.2, 0.0, 1.0, 2.0]),
        Sampling(),
        {"weight": lambda i, length, _: [0.2, 0, 1, 2, 0, 0, 0, 0][length - 1 - i]},
    ),
]


@pytest.fixture(scope="class")
def small_slices():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_TOKEN_MAJOR", 0), ("_WIDTH", 2), ("_SLICES", 2), ("_FEW", 2)):
            patch.setattr(_layout, name, value)
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.mark.usefixtures("small_slices")
class TestLaneMajor:
    @pytest.mark.parametrize(
        ("context", "decoder", "oracle"), LAID_OUT, ids=[f"{c}-{d}" for c, d, _ in LAID_OUT]
    )
    def test_law_of_short_trajectories(self, key, context, decoder, oracle):
        place = _layout.layout(5)
        assert isinstance(place, _layout.LaneMajor)
        assert (place.width, place.padded) == (4, 8)  # columns drawn in two levels; two slices
        laws = [trajectory_law(P5, prompt, 3, **oracle) for prompt in PROMPTS5]
        assert_laws("scan", P5, key, PROMPTS5, 3, laws, context=context, decoder=decoder)

    def test_nothing_to_attend(self, key):
        p = [[0.0, 1.0], [1.0, 0.0]]
        model = am.CCMC.from_transition_matrix(p)
        for decoder in (Sampling(), Sampling(0.5), Greedy()):
            tokens = am.rollout(
                model, key, [0, 1], 3, 2, context=WindowContext(1), decoder=decoder
            ).tokens
            assert (np.asarray(tokens) == -1).all()


# Then vocabularies of the sizes that they are for; 600 tokens draw columns from columns.

SIZES = [LANE_MAJOR, 300, 600]
WIDE = {
    "plain": (FullContext(), Sampling(), {}),
    "temperature": (FullContext(), Sampling(0.7), {"decode": hf_sampling(0.7)}),
    "decay": (
        DecayContext(0.97),
        Sampling(),
        {"weight": lambda i, length, _: 0.97 ** (length - 1 - i)},
    ),
    "window": (
        WindowContext(30),
        Sampling(),
        {"weight": window(30)},
    ),
}


def wide_model(size):
    return np.random.default_rng(size).dirichlet(np.full(size, 0.5), size)


@pytest.mark.parametrize("case", WIDE)
@pytest.mark.parametrize("size", SIZES)
def test_first_token_of_a_large_vocabulary(key, size, case):
    context, decoder, oracle = WIDE[case]
    prompt = np.random.default_rng(1).permutation(np.arange(2 * size) % size).tolist()
    law = context_law(wide_model(size), prompt, **oracle)
    law = {(j,): q for j, q in enumerate(law) if q > 0}
    laws = {"context": context, "decoder": decoder}
    assert_laws("scan", wide_model(size), key, [prompt], 1, [law], **laws)


@pytest.mark.parametrize("case", WIDE)
@pytest.mark.parametrize("size", SIZES)
def test_two_steps_over_a_few_tokens_of_a_large_vocabulary(key, size, case):
    # Tokens at both ends, at the edges of slices, and in the middle of one.
    context, decoder, oracle = WIDE[case]
    prompt = [0, size - 1, 15, 16, 17, 31, 32, 33, size // 2, size - 1, 16, 0]
    p = wide_model(size)
    p[prompt] += 0.1
    p /= p.sum(1, keepdims=True)
    law = trajectory_law(p, prompt, 2, **oracle)
    laws = {"context": context, "decoder": decoder}
    assert_laws("scan", p, key, [prompt], 2, [law], **laws)


@pytest.mark.parametrize("decoder", [Sampling(), Sampling(0.5)])
@pytest.mark.parametrize("size", [LANE_MAJOR, 600])
@pytest.mark.parametrize("spacing", [5, 16])  # rare tokens beside common ones, and apart
def test_rare_tokens_of_a_large_vocabulary_come_at_their_rate(key, size, spacing, decoder):
    # Rows are equal and the prompt long, so that no draw depends on those before it.
    lanes, steps = (8192, 1024) if size < 100 else (1024, 600)
    rare = np.arange(size) % spacing != 1
    law = np.where(rare, 1e-7, spacing / size)
    p = law ** (1.0 if decoder.is_plain else 0.5)  # squared at temperature 1/2
    model = am.CCMC.from_transition_matrix(np.tile(p / p.sum(), (size, 1)))
    prompt = am.Prompts.from_counts(np.full((1, size), 10**6), [0])
    counts = am.rollout(model, key, prompt, steps, lanes, "scan", "counts", decoder=decoder).counts
    drawn = np.asarray(counts, np.int64).sum((0, 1)) - lanes * 10**6
    assert drawn.sum() == lanes * steps
    mean = lanes * steps * law[rare].sum() / law.sum()
    assert mean > 25  # so that a third of it, or twice, would be seen
    assert_poisson(int(drawn[rare].sum()), mean)


@pytest.mark.parametrize("case", WIDE)
@pytest.mark.parametrize("size", [LANE_MAJOR, 300])
def test_absent_tokens_never_come(key, size, case):
    context, decoder, _ = WIDE[case]
    prompt = [size - 1, 3, 17, 3, 0]
    model = am.CCMC.from_transition_matrix(wide_model(size))
    tokens = am.rollout(model, key, prompt, 500, 200, context=context, decoder=decoder).tokens
    assert set(np.unique(np.asarray(tokens)).tolist()) <= set(prompt)


def simulate(p, runs, num_steps, gamma=1.0, window=None):
    """Counts of whole histories after a prompt of every token once, in float64 NumPy."""
    rng, size = np.random.default_rng(2), len(p)
    history = np.tile(np.arange(size), (runs, 1))
    counts, rows = np.ones((runs, size)), np.arange(runs)
    weights = counts * gamma ** np.arange(size - 1.0, -1, -1)
    if window is not None:
        weights = (np.arange(size) >= size - window) * counts
    for _ in range(num_steps):
        edges = (weights * p[history[:, -1]]).cumsum(1)
        token = (rng.random((runs, 1)) * edges[:, -1:] > edges).sum(1)
        weights *= gamma
        weights[rows, token] += 1
        if window is not None:
            weights[rows, history[:, -window]] -= 1
        history = np.column_stack([history[:, 1:], token])
        counts[rows, token] += 1
    return counts


@pytest.mark.parametrize("context", [FullContext(), DecayContext(0.9), WindowContext(8)])
def test_long_runs_of_a_large_vocabulary_have_the_moments(key, context):
    p, runs, num_steps = wide_model(LANE_MAJOR), 1500, 300
    theirs = simulate(
        p, runs, num_steps, getattr(context, "gamma", 1.0), getattr(context, "size", None)
    )
    model = am.CCMC.from_transition_matrix(p)
    prompt = np.arange(LANE_MAJOR)
    ours = am.rollout(model, key, prompt, num_steps, runs, "scan", "counts", context=context).counts
    ours = np.asarray(ours[:, 0], float)
    likely = theirs.mean(0).argsort()[-4:]
    measures = [
        lambda n: (n**2).sum(1),
        lambda n: stats.entropy(n, axis=1),
        lambda n: (n > 1).sum(1).astype(float),
        *(lambda n, j=j: n[:, j] for j in likely),
    ]
    for measure in measures:
        a, b = measure(ours), measure(theirs)
        z = (a.mean() - b.mean()) / np.hypot(a.std(), b.std()) * np.sqrt(runs)
        assert abs(z) < stats.norm.isf(FAILURE_RATE / 2 / len(measures))


@pytest.mark.parametrize("size", [3, LANE_MAJOR])
@pytest.mark.parametrize("context", [FullContext(), WindowContext(2)])
def test_logits_far_beyond_float32(key, size, context):
    # Of the context's tokens, those after query 0 are e**-120 as likely as one that is absent.
    logits = np.zeros((size, size))
    logits[:3, :3] = [[0, -120, -119], [0, -119.5, -120], [0, -118, -118.7]]
    p = np.exp(logits[:3, :3] + 119)  # in float64
    seen = getattr(context, "size", 5)
    model = am.CCMC.from_logits(logits)
    prompts = am.Prompts.from_tokens([[1, 2]], size, query=[0])
    tokens = am.rollout(model, key, prompts, 3, RUNS, context=context).tokens
    assert_law(tokens, trajectory_law(p, [1, 2], 3, window(seen), query=0))


@pytest.mark.parametrize("engine", keeping("counts"))
def test_a_single_token(key, engine):
    model = am.CCMC.from_transition_matrix([[1.0]])
    traj = am.rollout(model, key, [0, 0], 9, 3, OBJECTS[engine], "counts", [0, 4, 9])
    assert np.asarray(traj.counts).tolist() == [[[2], [6], [11]]] * 3


@pytest.mark.parametrize("engine", keeping("counts"))
@pytest.mark.parametrize("size", [3, 70])
def test_totals_are_conserved(key, engine, size):
    model = am.CCMC.from_transition_matrix(np.tile(wide_model(size)[0], (size, 1)))
    if record_of(engine, size) is None:
        pytest.skip("too many tokens for the engine")
    prompts, at = am.prompts.uniform(key, 5, 4, size), [0, 1, 30, 99]
    counts = am.rollout(model, key, prompts, 99, 5, OBJECTS[engine], "counts", at).counts
    counts = np.asarray(counts)
    np.testing.assert_array_equal(counts.sum(-1), np.tile(4 + np.array(at), (5, 1)))
    np.testing.assert_array_equal(counts[:, 0], prompts.counts)
    assert (np.diff(counts, axis=1) >= 0).all()
    assert (counts[np.tile(np.asarray(prompts.counts)[:, None] == 0, (1, 4, 1))] == 0).all()


@pytest.mark.parametrize("engine", [e for e in keeping("counts") if e not in EQUAL_ROWS])
@pytest.mark.parametrize("start", [[2**24 + 1, 2**24 - 3, 2**23], [2**30, 2**29 + 3, 2**24 + 1]])
def test_counts_past_float32_are_exact(key, engine, start):
    if engine == "reference" or OBJECTS[engine].max_context < sum(start) + 40:
        pytest.skip("keeps the history")
    model = am.CCMC.from_transition_matrix(P)
    prompt = am.Prompts.from_counts([start], [2])
    runs, at = 20_000, [1, 2, 40]
    counts = am.rollout(model, key, prompt, 40, runs, OBJECTS[engine], "counts", at).counts
    grown = np.asarray(counts, np.int64) - start
    assert (grown >= 0).all()
    np.testing.assert_array_equal(grown.sum(-1), np.tile(at, (runs, 1)))
    weights = np.array(start) * np.array(P)
    law = weights / weights.sum(1, keepdims=True)  # changes by 1e-6 in 40 steps
    two = {(a, b): law[2, a] * law[a, b] for a in range(3) for b in range(3)}
    assert_law(np.diff(grown[:, :2], axis=1, prepend=0).argmax(-1), two)


def test_lanes_split_by_the_engine_have_the_same_draws(key):
    model = am.CCMC.from_transition_matrix(wide_model(LANE_MAJOR))
    arguments = {"context": WindowContext(3), "decoder": Sampling(0.9)}
    prompts = am.prompts.uniform(key, 7, 5, LANE_MAJOR)
    whole = am.rollout(model, key, prompts, 30, 7, **arguments).tokens
    split = am.rollout(model, key, prompts, 30, 7, Scan(max_lanes=3), **arguments).tokens
    np.testing.assert_array_equal(whole, split)
