"""Diagnostics of token sequences against plain Python, and growth exponents against known ones."""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import FAILURE_RATE
from scipy import stats

import attnmarkov as am
from attnmarkov.dynamics.diagnostics import diagnose
from attnmarkov.dynamics.growth import fit_growth
from attnmarkov.experiments._statistics import quantile_interval
from attnmarkov.plot.diagnostics import diagnostics, distinct_ngrams, top_shares


def plain_distinct(rows, n):
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    each = [len(set(g)) / len(g) if g else math.nan for g in grams]
    everything = [g for row in grams for g in row]
    return each, len(set(everything)) / len(everything) if everything else math.nan


def plain_repetition(row, window):
    return sum(x in row[max(i - window, 0) : i] for i, x in enumerate(row)) / len(row)


def plain_top_share(row, steps, k):
    if steps > len(row):
        return math.nan
    return sum(c for _, c in Counter(row[:steps]).most_common(k)) / steps


def plain_entropy(row, steps):
    if steps > len(row):
        return math.nan
    return -sum(c / steps * math.log(c / steps) for c in Counter(row[:steps]).values())


def plain_collapse(row, share, window, num_winners):
    window = min(window, len(row))
    last = Counter(row[-window:])
    tokens = sorted(last, key=lambda x: (-last[x], x))[:num_winners]
    time = -1
    for t in range(len(row), window - 1, -1):
        if sum(x in tokens for x in row[t - window : t]) < share * window:
            break
        time = t
    return time


def plain_growth(row, token, decades):
    """Arrivals, exposure, slope and start, step by step."""
    total = len(row)
    start = max(math.ceil(total / 10**decades), 1)
    arrivals, exposure = 0, 0.0
    for t in range(start, total):  # the history has t tokens, row[t] comes
        n = row[:t].count(token)
        exposure += n / t
        arrivals += n > 0 and row[t] == token
    before, end = row[:start].count(token), row.count(token)
    grown = before > 0 and total > start
    slope = math.log(end / before) / math.log(total / start) if grown else math.nan
    return arrivals, exposure, slope


@pytest.fixture(scope="module")
def rows():
    """Sequences of various lengths: mixing ones, sticky ones, one that collapses, a single one."""
    rng = np.random.default_rng(5)
    lengths = [1, 2, 3, 9, 60, 61, 40]
    mixed = [
        rng.integers(0, k, n).tolist()
        for n, k in zip(lengths, [1, 5, 2, 3, 12, 3, 90], strict=True)
    ]
    loop = [7, 3, *[5, 5, 6] * 15]
    return [*mixed, [4] * 30, [0, 1, 2, 3, *[1] * 20, 0, *[1] * 25], loop]


def assert_matches(d, rows, at, num_winners, share, window):
    for n in range(1, 5):
        each, together = plain_distinct(rows, n)
        np.testing.assert_allclose(d.distinct[:, n - 1], each)
        np.testing.assert_allclose(d.corpus_distinct[n - 1], together)
    np.testing.assert_allclose(d.sequence_repetition, 1 - d.distinct)
    for i, w in enumerate(d.windows):
        np.testing.assert_allclose(d.repetition[:, i], [plain_repetition(r, w) for r in rows])
    for i, t in enumerate(at):
        for m, k in enumerate(d.top):
            expected = [plain_top_share(r, t, k) for r in rows]
            np.testing.assert_allclose(d.top_share[:, i, m], expected)
        expected = [plain_entropy(r, t) for r in rows]
        np.testing.assert_allclose(d.entropy[:, i], expected, atol=1e-12)
    tops = [min(x for x in r if r.count(x) == max(Counter(r).values())) for r in rows]
    assert d.winner.tolist() == tops
    np.testing.assert_allclose(
        d.winner_share, [r.count(w) / len(r) for r, w in zip(rows, tops, strict=True)]
    )
    expected = [plain_collapse(r, share, window, num_winners) for r in rows]
    assert d.collapse_time.tolist() == expected


@pytest.mark.parametrize(("share", "window", "num_winners"), [(0.9, 10, 1), (0.7, 6, 2)])
def test_everything_against_plain_python(rows, share, window, num_winners):
    at = [1, 2, 3, 7, 30, 60, 61]
    options = {
        "windows": [1, 3, 16],
        "at": at,
        "top": (1, 2, 50),
        "collapse_share": share,
        "collapse_window": window,
        "num_winners": num_winners,
    }
    d = diagnose(rows, **options)
    assert d.num_tokens == max(map(max, rows)) + 1
    assert_matches(d, rows, at, num_winners, share, window)
    collapsed = (d.collapse_time >= 0).tolist()
    assert True in collapsed
    assert False in collapsed  # never, and at some time, are both there
    padded = np.full((len(rows), 61), 999_999)  # padding may hold anything
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    same = diagnose(padded, 90, list(map(len, rows)), **options)
    assert_matches(same, rows, at, num_winners, share, window)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, "jax"])
def test_types_and_single_sequences(dtype):
    x = np.random.default_rng(0).integers(0, 6, 50)
    tokens = jnp.asarray(x) if dtype == "jax" else x.astype(dtype)
    d, single = diagnose(tokens[None], 6), diagnose(tokens, 6)
    assert_matches(d, [x.tolist()], d.at, 1, 0.9, 128)
    np.testing.assert_array_equal(d.top_share, single.top_share)
    assert d.at.tolist() == am.log_spaced(50, 60).tolist()


def test_large_ids_and_many_tokens():
    rng = np.random.default_rng(1)
    big = rng.choice([10**12, 10**12 + 1, 3, 77], 200)
    d = diagnose(big, collapse_window=9)
    assert d.num_tokens == 10**12 + 2
    assert_matches(d, [big.tolist()], d.at, 1, 0.9, 9)
    assert set(d.growth.tokens.tolist()) == set(big.tolist())
    # Written in base 65,536, five tokens lose the first in 64 bits.
    many = np.concatenate([rng.permutation(65_535), [1, 9, 9, 9, 9, 2, 9, 9, 9, 9]])
    d = diagnose(many, max_n=5, max_tokens=3)
    for n in range(1, 6):
        each, together = plain_distinct([many.tolist()], n)
        assert d.distinct[0, n - 1] == each[0] == together == d.corpus_distinct[n - 1]
    assert d.growth.tokens.shape == (3,)


def test_growth_against_plain_python(rows):
    fit = fit_growth(rows, decades=0.8)
    for r, row in enumerate(rows):
        for j, token in enumerate(fit.tokens):
            arrivals, exposure, slope = plain_growth(row, token, 0.8)
            assert fit.arrivals[r, j] == arrivals
            np.testing.assert_allclose(fit.exposure[r, j], exposure, atol=1e-12)
            np.testing.assert_allclose(fit.slope[r, j], slope, atol=1e-12)
    fewer = fit_growth(rows, decades=0.8, max_tokens=2)
    counts = Counter(x for row in rows for x in row)
    assert fewer.tokens.tolist() == sorted(sorted(counts, key=lambda x: (-counts[x], x))[:2])
    kept = np.isin(fit.tokens, fewer.tokens)
    np.testing.assert_allclose(fewer.exposure, fit.exposure[:, kept], atol=1e-12)
    low, high = fit.interval()
    n, a = fit.arrivals, fit.exposure
    inside = (a > 0) & (n > 0)
    # Ends of Garwood's interval: a Poisson count so extreme has probability 2.5 %.
    np.testing.assert_allclose(stats.poisson.sf(n[inside] - 1, (low * a)[inside]), 0.025)
    np.testing.assert_allclose(stats.poisson.cdf(n[inside], (high * a)[inside]), 0.025)
    none = (a > 0) & (n == 0)
    assert none.any()
    np.testing.assert_allclose((high * a)[none], -np.log(0.025))
    assert (low[none] == 0).all()
    assert np.isnan(fit.exponents[a == 0]).all()


def births(rng, rate, start, num_steps, many):
    """Token 1 comes with probability ``rate * n_1 / t`` at history length t, else token 0."""
    tokens = np.zeros((many, num_steps), np.int8)
    tokens[:, 50 - start : 50] = 1
    n = np.full(many, start)
    for t in range(50, num_steps):
        tokens[:, t] = rng.random(many) < rate * n / t
        n += tokens[:, t]
    return tokens


@pytest.mark.parametrize(("rate", "start"), [(0.2, 5), (0.5, 20), (0.8, 5)])
def test_intervals_of_single_sequences_cover(rate, start):
    many = 2000
    tokens = births(np.random.default_rng(11), rate, start, 3000, many)
    for level in (0.8, 0.95):
        fit = fit_growth(tokens, decades=math.log10(3000 / 50), level=level)
        assert (fit.start == 50).all()
        low, high = fit.interval()
        covered = ((low <= rate) & (rate <= high))[:, 1].sum()
        # Conservative, yet not by far: the ends are those of a discrete law.
        assert covered >= stats.binom.ppf(FAILURE_RATE, many, level)
        assert covered <= stats.binom.isf(FAILURE_RATE, many, level + 0.6 * (1 - level))
    (group,) = [g for g in fit.by_winner() if g.winner == 0]
    arrivals = fit.arrivals[fit.winner == 0, 1].sum()
    z = stats.norm.isf(FAILURE_RATE / 2)
    assert abs(group.exponent[1] / rate - 1) < z / math.sqrt(arrivals) + 0.01
    assert 0.85 < group.dispersion[1] < 1.1


def test_exponents_of_rollouts(key):
    """One row for all queries: given the past, token j comes at rate λ_j n_j / Σ_i λ_i n_i.

    So arrivals less their summed rates are a martingale, whose variance the sum bounds; and the
    fit's rate λ_j n_j / t is the smaller one of a time without losers.
    """
    exponents, prompt, many = np.array([1, 0.3, 0.5]), [0, 0, 0, 0, 1, 1, 2, 2], 256
    p = np.tile(exponents / exponents.sum(), (3, 1))
    traj = am.rollout(am.CCMC.from_transition_matrix(p), key, prompt, 20_000, many)
    whole = np.concatenate([np.tile(prompt, (many, 1)), np.asarray(traj.tokens)], axis=1)
    fit = diagnose(whole, decades=1.5).growth
    group, rows = fit.by_winner()[0], fit.winner == 0
    assert (group.winner, group.num_sequences) == (0, rows.sum())
    assert rows.sum() > 0.99 * many
    counts = np.stack([(whole == i).cumsum(axis=1)[:, fit.start[0] - 1 : -1] for i in range(3)])
    rates = exponents[:, None, None] * counts / np.einsum("i,irt->rt", exponents, counts)
    z = stats.norm.isf(FAILURE_RATE / 4)
    for j in (1, 2):
        arrivals, exposure = fit.arrivals[:, j].sum(), fit.exposure[:, j].sum()
        margin = z * math.sqrt(rates[j].sum()) / exposure
        predicted = rates[j].sum() / exposure
        assert abs(arrivals / exposure - predicted) < margin < 0.03
        assert 0 < predicted - exponents[j] < 0.05
        ours = fit.arrivals[rows, j].sum() / fit.exposure[rows, j].sum()
        np.testing.assert_allclose(group.exponent[j], ours)
        middle = quantile_interval(fit.slope[rows, j], 0.5, 0.05)
        assert (group.slope_lower[j], group.slope_upper[j]) == middle
        assert group.slope[j] == np.median(fit.slope[rows, j])
    assert abs(group.slope[2] - 0.5) < 0.06  # its counts are large enough for logarithms


def test_groups_and_small_groups():
    two = [[0] * 50 + [1] * 10, [1] * 50 + [0] * 10, [1] * 40 + [2] * 20]
    first, second = fit_growth(two, decades=0.5).by_winner()
    assert (first.winner, first.num_sequences) == (1, 2)
    assert (second.winner, second.num_sequences) == (0, 1)
    assert np.isneginf(first.slope_lower[1])  # two slopes allow no interval of 95 %
    assert np.isposinf(first.slope_upper[1])
    assert np.isnan(first.slope_lower[2])
    np.testing.assert_allclose(second.slope[0], math.log(50 / 19) / math.log(60 / 19))
    assert np.isnan(second.exponent[2])


def test_slopes_of_small_counts_are_marked():
    """Median slopes fall short of the exponent there, and the table says so."""
    rng = np.random.default_rng(4)
    text = repr(fit_growth(births(rng, 0.6, 5, 3000, 20), decades=math.log10(60)))
    assert "(low: counts below 50), dispersion" in text
    text = repr(fit_growth(np.tile([0, 0, 1], (2, 600)), decades=0.5))
    assert "low:" not in text


def test_clusters_show_in_the_dispersion():
    rng = np.random.default_rng(3)
    tokens = births(rng, 0.6, 20, 4000, 200)
    decades = math.log10(4000 / 50)
    plain = fit_growth(tokens, decades=decades).dispersion[:, 1]
    clustered = fit_growth(np.repeat(tokens, 6, axis=1), decades=decades).dispersion[:, 1]
    assert 0.8 < plain.mean() < 1.1
    assert clustered.mean() > 3


def test_prints_a_table_and_makes_a_dataset(rows):
    d = diagnose(rows, collapse_window=10)
    text = repr(d)
    assert text.startswith("Diagnostics(10 sequences of 1 to 61 tokens from a vocabulary of 90:\n")
    assert f"  distinct-2         {np.nanmedian(d.distinct[:, 1]):.3f}  (" in text
    assert "one token with 0.9 of every 10 tokens" in text
    assert f"beside token {Counter(d.winner.tolist()).most_common(1)[0][0]}, which has" in text
    assert len(text.splitlines()) < 25
    data = d.to_dataset()
    assert data["top_share"].dims == ("replicate", "step", "top")
    np.testing.assert_array_equal(data["growth_exponent"].sel(token=5), d.growth.exponents[:, 5])
    np.testing.assert_array_equal(data["distinct"].sel(ngram=4), d.distinct[:, 3])
    np.testing.assert_array_equal(data["collapse_time"], d.collapse_time)
    assert data.attrs["collapse_window"] == 10
    assert repr(diagnose([3])).startswith(
        "Diagnostics(1 sequence of 1 tokens from a vocabulary of 4:"
    )
    late = diagnose([[1, 2], [3, 3, 3]], at=[3])  # the first ends before the record
    assert "share of top 1     1.000\n" in repr(late)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "tokens: sequence 0 is empty"),
        ((np.zeros((0, 3), int),), "tokens: there is no sequence"),
        (([[]],), "tokens: sequence 0 is empty"),
        (([[1], []],), "tokens: sequence 1 is empty"),
        (([[1.5, 2]],), "tokens: expected integers"),
        (("text",), "tokens: expected integers"),
        (([[1, 2], "ab"],), "tokens"),
        ((np.zeros((2, 2, 2), int),), r"tokens: expected 1 or 2 dimension"),
        (([[0, 3], [-1, 2]],), r"tokens: entry \[1, 0\] is token id -1"),
        (([[0, 3]], 3), r"tokens: entry \[0, 1\] is token id 3, outside 0..2"),
        (([[0, 3]], 0), "num_tokens: must be at least 1"),
        (([[0, 3]], 4, [3]), "lengths: sequence 0 has length 3, but tokens hold 1 to 2"),
        (([[0, 3]], 4, [0]), "lengths: sequence 0 has length 0"),
        (([[0, 3]], 4, [1, 1]), r"lengths: expected shape \(1,\)"),
    ],
)
def test_bad_sequences(arguments, message):
    with pytest.raises(ValueError, match=message):
        diagnose(*arguments)
    with pytest.raises(ValueError, match=message):
        fit_growth(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_n": 0}, "max_n: must be at least 1"),
        ({"windows": []}, "windows: is empty"),
        ({"windows": [4, 4]}, "windows: must increase, but has 4 after 4"),
        ({"top": [0, 1]}, "top: must be at least 1, got 0"),
        ({"at": [1, 7]}, "at: 7 is past the longest sequence, which has 3 tokens"),
        ({"collapse_share": 0}, r"collapse_share: must lie in \(0, 1\], got 0"),
        ({"collapse_window": 0}, "collapse_window: must be at least 1"),
        ({"num_winners": 1.5}, "num_winners: expected an integer"),
        ({"decades": -1}, "decades: must be positive"),
        ({"level": 1}, "level: must lie between 0 and 1"),
        ({"level": "high"}, "level: expected an array of real numbers"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        diagnose([0, 1, 2], **options)


def test_traced_tokens_are_refused():
    with pytest.raises(ValueError, match="tokens: must be known"):
        jax.jit(lambda x: diagnose(x).entropy)(jnp.arange(5))


def test_figure():
    rng = np.random.default_rng(0)
    stuck = np.concatenate([rng.integers(0, 4, (9, 50)), np.full((9, 250), 2)], axis=1)
    short = [rng.integers(0, 30, n).tolist() for n in (3, 40, 80)]
    d = {"stuck": diagnose(stuck), "short": diagnose(short)}
    left, right = diagnostics(d)
    for ax in (left, right):
        legend = ax.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == ["stuck", "short"]
    lines = {line.get_label(): line for line in left.get_lines()}
    np.testing.assert_allclose(
        np.asarray(lines["stuck"].get_ydata()), np.median(d["stuck"].top_share[..., 0], axis=0)
    )
    short_line = np.nanmedian(d["short"].top_share[..., 0], axis=0)
    np.testing.assert_allclose(np.asarray(lines["short"].get_ydata()), short_line)
    (dot,) = [line for line in left.get_lines() if line.get_marker() == "o"]
    assert np.asarray(dot.get_xdata())[0] == np.median(d["stuck"].collapse_time)
    assert "dot: median collapse" in left.get_title()
    heights = right.containers[0][0].get_ydata()
    np.testing.assert_allclose(heights, np.median(d["stuck"].distinct, axis=0))
    alone = top_shares(d["short"], k=10)
    assert alone.get_legend() is None
    assert "10 most frequent" in alone.get_ylabel()
    assert distinct_ngrams(d["short"], ax=alone) is alone
    with pytest.raises(
        ValueError, match="k: the share of the top 3 was not followed; known: 1, 10"
    ):
        top_shares(d, k=3)
    with pytest.raises(ValueError, match="batches: there is none"):
        distinct_ngrams({})
