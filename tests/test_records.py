"""What rollouts record, against plain loops over the tokens of the same rollouts."""

import itertools
import types
from fractions import Fraction
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import LANE_MAJOR, TESTED
from oracles import assert_law, assert_mean
from scipy import stats

import attnmarkov as am
from attnmarkov.model import (
    DecayContext,
    FullContext,
    Greedy,
    LagContext,
    PositionContext,
    Sampling,
    WindowContext,
)
from attnmarkov.rollout import SkipAhead, Summary, _devices

P = [[0.35, 0.4, 0.25], [0.5, 0.3, 0.2], [0.3, 0.3, 0.4]]
MODEL = am.CCMC.from_transition_matrix(P)
AT = [0, 1, 7, 40]
PROMPTS = [[0, 1, 2, 2], [1, 0], [2], [0, 2, 2, 2, 2], [1, 1, 1], [2, 1, 1, 1, 0, 0, 1, 2]]


def entropy(counts):
    return stats.entropy(np.asarray(counts, float), axis=-1)


def reach_of(context):
    if isinstance(context, WindowContext):
        return context.size
    return np.size(context.weights) if isinstance(context, LagContext) else 10**9


def looped(prompt, query, tokens, at, size, share, reach):
    """The summaries of one trajectory; ``share`` is exact."""
    prompt, tokens, out = list(prompt), list(tokens), {}
    records, spans = [0, *at], list(itertools.pairwise([0, *at]))
    assert records[-1] == len(tokens)
    out["entropy"] = [entropy(np.bincount(prompt + tokens[:t], minlength=size)) for t in at]
    out["distinct"] = [len(set(tokens[:t])) for t in at]
    out["recent"] = [len(set(tokens[a:b])) for a, b in spans]
    out["transitions"] = np.zeros((size, size), int)
    for a, b in itertools.pairwise([query, *tokens]):
        out["transitions"][a, b] += 1
    out["passage_time"] = out["absorption_time"] = -1
    for t in range(len(tokens), -1, -1):
        history = prompt + tokens[:t]
        if max(history.count(j) for j in set(history)) >= share * len(history):
            out["passage_time"] = t
        if len(set(history[-reach:])) == 1:
            out["absorption_time"] = t
    return out


def assert_summaries(summary, rows):
    for name in ("distinct", "recent", "transitions", "passage_time", "absorption_time"):
        np.testing.assert_array_equal(getattr(summary, name), [r[name] for r in rows], name)
    np.testing.assert_allclose(summary.entropy, [r["entropy"] for r in rows], atol=2e-6)


SUMMARISED = [
    (FullContext(), Sampling(), "0.6"),
    (FullContext(exponent=2.0), Sampling(0.8), "0.8"),
    (WindowContext(3), Sampling(), "0.9"),
    (WindowContext(2), Sampling(0.6), "0.6"),
    (LagContext([0.5, 1.0, 0.0]), Sampling(), "0.7"),
    (DecayContext(0.8), Sampling(top_p=0.9), "0.75"),
]
CASES = [(3, *case) for case in SUMMARISED] + [(LANE_MAJOR, *case) for case in SUMMARISED[:5:2]]


@pytest.mark.parametrize(("size", "context", "decoder", "share"), CASES)
def test_summaries_are_those_of_the_tokens(key, size, context, decoder, share):
    p = np.full((size, size), 1e-3)
    p[:3, :3] = P
    model = am.CCMC.from_transition_matrix(p / p.sum(1, keepdims=True))
    prompts = am.Prompts.from_tokens(PROMPTS * 5, size)
    law = {"context": context, "decoder": decoder}
    many = len(prompts)
    tokens = np.asarray(am.rollout(model, key, prompts, 40, many, **law).tokens)
    record = Summary(share=float(share))
    summary = am.rollout(model, key, prompts, 40, many, record=record, at=AT, **law).summary
    rows = [
        looped(prompt, prompt[-1], row, AT, size, Fraction(share), reach_of(context))
        for prompt, row in zip(PROMPTS * 5, tokens, strict=True)
    ]
    assert_summaries(summary, rows)
    passed, absorbed = np.asarray(summary.passage_time), np.asarray(summary.absorption_time)
    assert 0 in passed  # a share passed at the prompt
    assert (passed > 0).any()
    assert (absorbed == 0).any()
    assert (absorbed > 0).any() == (reach_of(context) < 10)


@pytest.mark.parametrize("share", ["0.09", "0.57"])
def test_a_share_is_passed_when_it_is_reached_exactly(key, share):
    # In float32 0.09 * 300 is above 27.
    exact = Fraction(share)
    model = am.CCMC.from_logits([[0.0] + [-25.0] * 19] * 20)  # what comes is token 0
    record = Summary(share=float(share), transitions=False)
    for times in (1, 3):
        others = np.bincount(np.arange(times * (exact.denominator - exact.numerator)) % 19)
        for missing in (0, 1, 2):  # the share is short of as many tokens 0
            counts = [times * exact.numerator - missing, *others]
            prompts = am.Prompts.from_counts([counts], [0])
            run = am.rollout(model, key, prompts, 3, record=record).summary
            assert run.passage_time.tolist() == [missing]


def test_summaries_of_counts_alone_and_without_transitions(key):
    prompts = am.Prompts.from_counts([[2, 0, 1], [0, 4, 0]], [0, 1])
    tokens = np.asarray(am.rollout(MODEL, key, prompts, 40, 2).tokens)
    full = am.rollout(MODEL, key, prompts, 40, 2, record="summary", at=AT)
    ids = [[0, 2, 0], [1] * 4]
    rows = [
        looped(prompt, prompt[-1], row, AT, 3, Fraction(1, 2), 10**9)
        for prompt, row in zip(ids, tokens, strict=True)
    ]
    assert_summaries(full.summary, rows)
    assert full.summary.absorption_time.tolist() == [-1, 0]
    lean = am.rollout(MODEL, key, prompts, 40, 2, record=Summary(transitions=False), at=AT).summary
    assert lean.transitions is None
    np.testing.assert_array_equal(lean.distinct, full.summary.distinct)


@pytest.mark.parametrize("context", [FullContext(), WindowContext(2)])
def test_summaries_after_a_query_given_apart(key, context):
    prompts = am.Prompts.from_tokens([[0, 1], [1, 1]], 3, query=[2, 0])
    tokens = np.asarray(am.rollout(MODEL, key, prompts, 40, 2, context=context).tokens)
    summary = am.rollout(
        MODEL, key, prompts, 40, 2, record="summary", at=AT, context=context
    ).summary
    cases = zip([[0, 1], [1, 1]], [2, 0], tokens, strict=True)
    rows = [looped(*case, AT, 3, Fraction(1, 2), reach_of(context)) for case in cases]
    assert_summaries(summary, rows)


def test_summaries_without_records_before_the_end(key):
    summary = am.rollout(MODEL, key, [0, 1, 2], 30, 4, record="summary").summary
    assert summary.entropy.shape == summary.recent.shape == (4, 1)
    np.testing.assert_array_equal(summary.recent, summary.distinct)
    nothing = am.rollout(MODEL, key, [0, 1, 2], 0, 4, record="summary").summary
    assert nothing.distinct.tolist() == [[0]] * 4
    np.testing.assert_allclose(nothing.entropy, np.log(3), rtol=1e-6)


@pytest.mark.parametrize(
    "context", [FullContext(), WindowContext(3), LagContext([1, 0.5, 2]), DecayContext(0.7)]
)
@pytest.mark.parametrize("size", [3, LANE_MAJOR])
def test_chunks_are_the_tokens(key, context, size):
    model = am.CCMC.from_transition_matrix(am.random_transition_matrix(key, size))
    prompts = am.prompts.uniform(key, 5, 6, size)
    whole = np.asarray(am.rollout(model, key, prompts, 23, 5, context=context).tokens)
    for chunk in (5, 23, 100) if size == 3 else (7,):
        parts = list(am.rollout_chunks(model, key, prompts, 23, 5, context=context, chunk=chunk))
        sizes = [part.tokens.shape[1] for part in parts]
        assert sizes == [chunk] * (23 // chunk) + [23 % chunk] * (23 % chunk > 0)
        np.testing.assert_array_equal(np.concatenate([p.tokens for p in parts], axis=1), whole)


def test_chunks_come_one_by_one(key):
    # All tokens together would be 4e12 bytes, and a list of the chunks' edges 1e9.
    parts = am.rollout_chunks(MODEL, key, [0, 1, 2], 10**9, 4000, chunk=10, first_replicate=3)
    assert isinstance(parts, types.GeneratorType)
    first, second = (next(parts) for _ in range(2))
    whole = am.rollout(MODEL, key, [0, 1, 2], 20, 4000, first_replicate=3).tokens
    np.testing.assert_array_equal(np.concatenate([first.tokens, second.tokens], axis=1), whole)
    assert repr(first) == "Trajectory(4000 trajectories of 3 tokens, 10 steps, engine='scan')"
    assert list(am.rollout_chunks(MODEL, key, [0], 0, 2, chunk=10)) == []


@pytest.mark.parametrize(
    "context", [WindowContext(3), LagContext([1, 0.5]), DecayContext(0.7), FullContext()]
)
@pytest.mark.parametrize("size", [3, LANE_MAJOR])
def test_counts_are_those_of_the_whole_history(key, context, size):
    model = am.CCMC.from_transition_matrix(am.random_transition_matrix(key, size))
    prompts = am.Prompts.from_tokens(PROMPTS, size)
    tokens = np.asarray(am.rollout(model, key, prompts, 40, 6, context=context).tokens)
    counts = am.rollout(model, key, prompts, 40, 6, record="counts", at=AT, context=context).counts
    expected = [
        [np.bincount([*prompt, *row[:t]], minlength=size) for t in AT]
        for prompt, row in zip(PROMPTS, tokens, strict=True)
    ]
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("decoder", [Sampling(), Sampling(0.5), Greedy()])
@pytest.mark.parametrize("size", [2, LANE_MAJOR])
def test_a_lane_with_nothing_to_attend_stays_as_it_is(key, decoder, size):
    # Under lags (0, 1) the first prompt has nothing to attend; the other goes round.
    model = am.CCMC.from_logits(np.zeros((size, size)))
    prompts = am.Prompts.from_tokens([[1], [1, 0]], size)
    law = {"context": LagContext([0.0, 1.0]), "decoder": decoder}
    tokens = am.rollout(model, key, prompts, 5, 2, "scan", **law).tokens
    assert tokens.tolist() == [[-1] * 5, [1, 0, 1, 0, 1]]
    counts = am.rollout(model, key, prompts, 5, 2, "scan", "counts", [0, 1, 5], **law).counts
    assert counts[:, :, :2].tolist() == [[[0, 1]] * 3, [[1, 1], [1, 2], [3, 4]]]
    summary = am.rollout(model, key, prompts, 5, 2, "scan", "summary", [1, 5], **law).summary
    assert summary.distinct.tolist() == [[0, 0], [1, 2]]
    assert np.asarray(summary.transitions).sum((1, 2)).tolist() == [0, 5]
    assert summary.passage_time.tolist() == [0, 0]
    assert summary.absorption_time.tolist() == [0, -1]


def test_a_window_that_the_query_cannot_attend(key):
    # Token 0 attends 1 alone: once the window of one token holds it, nothing is left.
    model = am.CCMC.from_transition_matrix([[0, 1], [1, 0]])
    law: dict[str, Any] = {"context": WindowContext(1)}
    tokens = am.rollout(model, key, [0, 1], 4, 3, **law).tokens
    assert tokens.tolist() == [[-1] * 4] * 3
    counts = am.rollout(model, key, [0, 1], 4, 3, record="counts", at=[1, 4], **law).counts
    assert counts.tolist() == [[[1, 1], [1, 1]]] * 3
    parts = am.rollout_chunks(model, key, [0, 1], 4, 3, **law, chunk=3)
    assert [part.tokens.tolist() for part in parts] == [[[-1] * 3] * 3, [[-1]] * 3]
    # A window of two lets it go round until the other token has left.
    p = [[0.0, 1.0], [0.5, 0.5]]
    tokens = am.rollout(am.CCMC.from_transition_matrix(p), key, [1, 0], 60, 50, **law).tokens
    assert (np.asarray(tokens) == -1).all()


@pytest.mark.parametrize("engine", ["scan", "rejection", "reference"])
@pytest.mark.parametrize(("size", "dtype"), [(3, "int8"), (128, "int8"), (129, "int16")])
def test_tokens_come_in_the_narrowest_type(key, engine, size, dtype):
    model = am.CCMC.from_logits(np.zeros((size, size)))
    tokens = am.rollout(model, key, [size - 1], 3, 2, engine).tokens
    assert tokens.dtype == dtype
    assert tokens.tolist() == [[size - 1] * 3] * 2
    (part,) = am.rollout_chunks(model, key, [size - 1], 3, 2, chunk=3)
    assert part.tokens.dtype == dtype


@pytest.mark.parametrize(
    ("size", "steps", "many", "record", "message"),
    [
        (
            3,
            10**9,
            10**6,
            {},
            r"record: tokens of 1000000 x 1000000000 int8 take 931,322\.6 GiB.* there are 2\.0; "
            r"ask for record='counts' or 'summary', or rollout_chunks instead",
        ),
        (
            4096,
            10,
            10**5,
            {"record": "summary"},
            r"record: transition counts of 100000 x 4096 x 4096 int32 take 6,250\.0 GiB.* "
            r"ask for Summary\(transitions=False\), or fewer trajectories",
        ),
        (
            3,
            2 * 10**6,
            10**3,
            {"record": "counts", "at": np.arange(10**6)},
            r"record: counts of 1000 x 1000000 x 3 int32 take 11\.2 GiB.* fewer steps in `at`",
        ),
    ],
)
def test_records_beyond_memory_are_refused(key, monkeypatch, size, steps, many, record, message):
    monkeypatch.setattr(_devices, "memory", lambda: 2 * 2**30)
    model = am.CCMC.from_logits(np.zeros((size, size)))
    with pytest.raises(ValueError, match=message):
        am.rollout(model, key, [0], steps, many, **record)
    if not record:
        with pytest.raises(ValueError, match=r"record: tokens of .* ask for a shorter chunk"):
            am.rollout_chunks(model, key, [0], steps, many, chunk=10**6)


def test_memory_is_that_of_the_machine(key):
    memory = _devices.memory()
    assert memory is not None
    assert 2**28 < memory < 2**50
    with pytest.raises(ValueError, match="tokens of 1000000 x 1000000000 int8 take"):
        am.rollout(MODEL, key, [0], 10**9, 10**6)


def test_trajectories_print_and_convert(key):
    arguments = (MODEL, key, [0, 1, 2], 10, 4)
    tokens = am.rollout(*arguments)
    counts = am.rollout(*arguments, record="counts", at=[5, 10])
    summary = am.rollout(*arguments, record=Summary(0.75), at=[5, 10])
    assert repr(tokens) == "Trajectory(4 trajectories of 3 tokens, 10 steps, engine='scan')"
    assert repr(counts).startswith(
        "Trajectory(4 trajectories of 3 tokens, counts at 2 times up to step 10, median top share "
    )
    passed = int((np.asarray(summary.summary.passage_time) >= 0).sum())
    assert repr(summary).startswith(
        f"Trajectory(Summaries(4 trajectories: {passed} passed a share of 0.75, 0 absorbed in one "
    )
    assert repr(summary).endswith("nats at the end) at 2 times, engine='scan')")

    dataset = tokens.to_dataset()
    assert dict(dataset.sizes) == {"replicate": 4, "step": 10}
    np.testing.assert_array_equal(dataset.tokens, tokens.tokens)
    dataset = counts.to_dataset()
    assert dict(dataset.sizes) == {"replicate": 4, "step": 2, "token": 3}
    assert dataset.step.values.tolist() == [5, 10]
    dataset = summary.to_dataset()
    assert dict(dataset.sizes) == {"replicate": 4, "step": 2, "query": 3, "token": 3}
    assert dataset.attrs == {"engine": "scan", "share": 0.75}
    np.testing.assert_array_equal(dataset.transitions, summary.summary.transitions)
    np.testing.assert_array_equal(dataset.passage_time, summary.summary.passage_time)
    lean = am.rollout(*arguments, record=Summary(transitions=False)).to_dataset()
    assert "transitions" not in lean

    for trajectory, kind in ((tokens, "tokens"), (counts, "counts"), (summary, "a summary")):
        for name in {"tokens", "counts", "summary"} - {kind.removeprefix("a ")}:
            with pytest.raises(ValueError, match=f"{name}: this rollout recorded {kind}; pass"):
                getattr(trajectory, name)


def test_a_window_that_never_ends_is_the_full_context(key):
    prompts = am.Prompts.from_tokens(PROMPTS, 3)
    full = am.rollout(MODEL, key, prompts, 30, 6).tokens
    for size in (8 + 30, 10**9, 2**40):
        window = am.rollout(MODEL, key, prompts, 30, 6, context=WindowContext(size)).tokens
        np.testing.assert_array_equal(window, full)
    for size in (36, 37):  # never left behind either, but kept in a ring
        window = am.rollout(MODEL, key, prompts, 30, 6, context=WindowContext(size)).tokens
        np.testing.assert_array_equal(window[:, :28], full[:, :28])
    short = am.rollout(MODEL, key, prompts, 30, 6, context=WindowContext(9)).tokens
    assert (np.asarray(short) != np.asarray(full)).any()
    window = WindowContext(50)
    summary = am.rollout(MODEL, key, [2], 9, 2, record="summary", context=window).summary
    assert summary.absorption_time.tolist() == [0, 0]


def test_mean_time_and_place_of_absorption(key):
    # A window of two tokens is a Markov chain on pairs, absorbed in (0, 0) or (1, 1).
    p = np.array([[0.3, 0.7], [0.55, 0.45]])
    inner, ends = [(0, 1), (1, 0)], [(0, 0), (1, 1)]
    move = np.zeros((2, 2))
    stop = np.zeros((2, 2))
    for i, (a, b) in enumerate(inner):
        law = {j: p[b, j] / p[b].sum() for j in (a, b)}
        for j, probability in law.items():
            if (b, j) in ends:
                stop[i, ends.index((b, j))] += probability
            else:
                move[i, inner.index((b, j))] += probability
    fundamental = np.linalg.inv(np.eye(2) - move)
    mean_time, places = fundamental.sum(1)[0], (fundamental @ stop)[0]
    run = am.rollout(
        am.CCMC.from_transition_matrix(p),
        key,
        [0, 1],
        400,
        20_000,
        record="summary",
        at=[390, 400],
        context=WindowContext(2),
    ).summary
    assert (np.asarray(run.absorption_time) > 0).all()
    assert (np.asarray(run.recent[:, 1]) == 1).all()
    assert_mean(run.absorption_time, mean_time)
    assert_mean(np.asarray(run.absorption_time) ** 0.5, sum_over_law(move, stop, np.sqrt))
    winner = np.asarray(run.transitions)[:, [0, 1], [0, 1]].argmax(1)
    assert_law(winner[:, None], {(0,): places[0], (1,): places[1]})


def sum_over_law(move, stop, f):
    """Mean of ``f`` of the time of absorption from the first state."""
    state, total = np.array([1.0, 0.0]), 0.0
    for t in range(1, 2000):
        total += f(t) * (state @ stop).sum()
        state = state @ move
    return total


BAD: list[Any] = [
    ({"context": WindowContext(0)}, "size: must be at least 1, got 0"),
    ({"context": cast("Any", WindowContext)(2.5)}, "size: expected an integer, got 2.5"),
    ({"context": DecayContext(0.0)}, r"gamma: must lie in \(0, 1\], got 0"),
    ({"context": DecayContext(1.5)}, r"gamma: must lie in \(0, 1\], got 1.5"),
    ({"context": cast("Any", DecayContext)("x")}, "gamma: expected a number, got 'x'"),
    ({"context": FullContext(exponent=np.inf)}, "exponent: must lie between -1e6 and 1e6, got inf"),
    ({"context": cast("Any", FullContext)(exponent=[1, 2])}, "exponent: expected a number"),
    ({"context": LagContext([])}, "weights: "),
    ({"context": LagContext([1.0, -1.0])}, "weights: "),
    ({"context": LagContext([0.0, 0.0])}, "weights: "),
    ({"context": PositionContext(np.zeros((3, 3)))}, "context: holds 3 positions, but the last"),
    ({"context": "window"}, r"context: expected a Context such as FullContext\(\), got 'window'"),
    ({"context": WindowContext}, "context: expected a Context"),
    ({"decoder": Sampling(0.0)}, "temperature: must be positive and finite, got 0"),
    ({"decoder": Sampling(np.inf)}, "temperature: must be positive and finite, got inf"),
    ({"decoder": Sampling(top_p=0.0)}, r"top_p: must lie in \(0, 1\], got 0"),
    ({"decoder": Sampling(top_p=1.1)}, r"top_p: must lie in \(0, 1\], got 1.1"),
    ({"decoder": Sampling(top_k=0)}, "top_k: must be at least 1, got 0"),
    ({"decoder": cast("Any", Sampling)(top_k=1.5)}, "top_k: expected an integer, got 1.5"),
    ({"decoder": Sampling(repetition_penalty=-1)}, "repetition_penalty: must be positive"),
    ({"decoder": "greedy"}, r"decoder: expected a Decoder such as Sampling\(\), got 'greedy'"),
    ({"decoder": FullContext()}, "decoder: expected a Decoder"),
    ({"record": Summary(share=0.0)}, r"share: must lie in \(0, 1\], got 0"),
    ({"record": Summary(share=1.01)}, r"share: must lie in \(0, 1\], got 1.01"),
    ({"record": "chunks"}, "record: unknown record 'chunks'"),
    (
        {"context": WindowContext(2), "prompt": am.Prompts.from_counts([[1, 1, 0]], [0])},
        "context: WindowContext weighs positions, so it needs token ids",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(key, change, message):
    with pytest.raises(ValueError, match=message):
        am.rollout(**{"model": MODEL, "key": key, "prompt": [0, 1], "num_steps": 10} | change)
    if "record" not in change:
        with pytest.raises(ValueError, match=message):
            am.rollout_chunks(
                **{"model": MODEL, "key": key, "prompt": [0, 1], "num_steps": 10, "chunk": 5}
                | change
            )


def test_bad_chunks(key):
    with pytest.raises(ValueError, match="chunk: must be at least 1, got 0"):
        am.rollout_chunks(MODEL, key, [0], 10, chunk=0)


REFUSED = [
    ({"engine": "reference", "record": "summary"}, "reference can't summarise", ["scan"]),
    ({"engine": "scan", "context": PositionContext(np.zeros((20, 20)))}, None, ["reference"]),
    ({"engine": "skip_ahead", "record": "tokens"}, "skip_ahead can't keep tokens", None),
    ({"engine": "skip_ahead", "record": "summary"}, "skip_ahead can't", ["scan"]),
    ({"engine": "urn", "context": DecayContext(0.5)}, "urn can't take DecayContext", None),
    ({"engine": "skip_ahead", "decoder": Greedy()}, "skip_ahead can't decode", None),
    ({"engine": "skip_ahead", "context": FullContext(exponent=2.0)}, "skip_ahead can't", None),
    (
        {"record": "summary", "context": PositionContext(np.zeros((20, 20)))},
        "reference can't summarise",
        ["none"],
    ),
]


@pytest.mark.parametrize(("change", "what", "able"), REFUSED)
def test_refusals_name_the_engines_that_can(key, change, what, able):
    arguments = {"model": MODEL, "key": key, "prompt": [0, 1], "num_steps": 10, "record": "counts"}
    with pytest.raises(ValueError, match=r"^engine: \w+ can't .*; engines that can: ") as refusal:
        am.rollout(**arguments | change)
    message = str(refusal.value)
    assert what is None or what in message
    named = message.rpartition(": ")[2].split(", ")
    assert set(named) >= set(able or ["reference", "scan"])
    assert change.get("engine") not in named
    for name in set(named) & set(TESTED):
        am.rollout(**arguments | change | {"engine": name})


def test_chunks_name_the_engines_that_can(key):
    for engine in ("reference", "skip_ahead", "urn"):
        with pytest.raises(ValueError, match=rf"engine: {engine} can't .* that can: scan"):
            am.rollout_chunks(MODEL, key, [0, 1], 10, engine=engine, chunk=5)


def test_an_engine_object_is_named_by_its_class(key):
    with pytest.raises(ValueError, match="engine: SkipAhead can't keep tokens"):
        am.rollout(MODEL, key, [0, 1], 10, engine=SkipAhead())


def test_auto_takes_what_can(key):
    position = PositionContext(np.zeros((20, 20)))
    assert am.rollout(MODEL, key, [0], 3, context=position).engine == "reference"
    assert am.rollout(MODEL, key, [0], 3, context=DecayContext(0.5)).engine == "scan"
    assert am.rollout(MODEL, key, [0], 3, decoder=Greedy()).engine == "scan"
    tokens = am.rollout(MODEL, key, [0, 1], 20, 3, context=DecayContext(jnp.float32(1.0))).tokens
    assert tokens.shape == (3, 20)
