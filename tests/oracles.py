"""Plain float64 NumPy truths, written apart from the package."""

import itertools
from collections import Counter

import numpy as np
from scipy import stats

FAILURE_RATE = 1e-6  # of each statistical test, if its hypothesis holds


def attention_law(e, w, tokens, query=None):
    """Next-token law of one-layer attention, position by position: C pinv-dual to E."""
    e, w = np.asarray(e, float), np.asarray(w, float)
    x = e[np.asarray(tokens)]
    q = e[tokens[-1] if query is None else query]
    scores = x @ w @ q
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    return np.array([weights[np.asarray(tokens) == j].sum() for j in range(len(e))])


def ccmc_law(p, context, last=None):
    """n_j P[k, j] / sum over a list of tokens."""
    p = np.asarray(p, float)
    last = context[-1] if last is None else last
    weights = np.array([context.count(j) * p[last, j] for j in range(len(p))])
    return weights / weights.sum()


def trajectory_law(p, prompt, num_steps):
    """{tokens: probability} of every trajectory of ``num_steps`` tokens, by enumeration."""
    law = {}
    for tokens in itertools.product(range(len(p)), repeat=num_steps):
        context, probability = list(prompt), 1.0
        for token in tokens:
            probability *= ccmc_law(p, context)[token]
            context.append(token)
        if probability > 0:
            law[tokens] = probability
    return law


def markov_law(p, initial, num_steps):
    law = {}
    for tokens in itertools.product(range(len(p)), repeat=num_steps):
        steps = [p[a][b] for a, b in itertools.pairwise(tokens)]
        probability = float(initial[tokens[0]] * np.prod(steps))
        if probability > 0:
            law[tokens] = probability
    return law


def assert_law(samples, law):
    """Chi-squared goodness of fit of (R, T) samples to {tuple: probability}."""
    samples = np.asarray(samples)
    seen = Counter(map(tuple, samples.tolist()))
    impossible = set(seen) - set(law)
    assert not impossible, f"impossible under the law: {sorted(impossible)[:3]}"
    expected = np.array([law[k] for k in law]) * len(samples)
    observed = np.array([seen[k] for k in law])
    small = expected < 8  # pooled into one cell
    if small.any():
        expected = np.append(expected[~small], expected[small].sum())
        observed = np.append(observed[~small], observed[small].sum())
    if len(expected) == 1:
        return
    p_value = stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue
    assert p_value > FAILURE_RATE, f"chi-squared p-value {p_value:.3g}"


def assert_poisson(hits, mean):
    """A two-sided Poisson test of a number of rare hits."""
    tail = min(stats.poisson.cdf(hits, mean), stats.poisson.sf(hits - 1, mean))
    assert tail > FAILURE_RATE / 2, f"{hits} hits where {mean:.3g} were expected"


def assert_mean(values, expected):
    """The mean of independent values, by the normal approximation."""
    values = np.asarray(values, float)
    error = values.std(ddof=1) / np.sqrt(values.size)
    z = (values.mean() - expected) / error
    assert abs(z) < stats.norm.isf(FAILURE_RATE / 2), f"off by {z:.2f} standard errors"
