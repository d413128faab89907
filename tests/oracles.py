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


def context_law(p, context, query=None, weight=None, exponent=1.0, decode=None, shift=None):
    """Next-token law after a list of tokens of which position ``i`` has ``weight(i, L, query)``.

    Proportional to n_j ** exponent * p[query, j] * exp(shift(j, L)), then decoded.
    """
    length, query = len(context), context[-1] if query is None else query
    law = np.zeros(len(p))
    for j in range(len(p)):
        places = [i for i, token in enumerate(context) if token == j]
        n = float(sum(1 if weight is None else weight(i, length, query) for i in places))
        if n > 0:
            law[j] = n**exponent * p[query][j]
            law[j] *= 1 if shift is None else np.exp(shift(j, length))
    law /= law.sum()
    return law if decode is None else decode(law)


def trajectory_law(
    p, prompt, num_steps, weight=None, exponent=1.0, decode=None, shift=None, query=None
):
    """{tokens: probability} of every trajectory of ``num_steps`` tokens, by enumeration.

    ``query`` is the prompt's, if it is not its last token; the rest as ``context_law``.
    """
    law = {(): 1.0}
    for _ in range(num_steps):
        grown = {}
        for tokens, probability in law.items():
            last = tokens[-1] if tokens else query
            step = context_law(p, [*prompt, *tokens], last, weight, exponent, decode, shift)
            grown |= {(*tokens, j): probability * step[j] for j in range(len(p)) if step[j] > 0}
        law = grown
    return law


def hf_sampling(temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0):
    """Hugging Face's logits processors, one after the other, on log-probabilities."""

    def softmax(scores):
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    def decode(law):
        law = np.asarray(law, float)
        with np.errstate(divide="ignore"):
            scores = np.log(law)
        seen = law > 0  # the tokens of the context
        penalised = np.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
        scores = np.where(seen, penalised, scores)
        scores = scores / temperature
        if top_k is not None:
            kth = np.sort(scores)[-min(top_k, scores.size)]
            scores = np.where(scores < kth, -np.inf, scores)
        if top_p is not None:
            order = np.argsort(scores)
            remove = softmax(scores)[order].cumsum() <= 1 - top_p
            remove[-1] = False
            scores[order[remove]] = -np.inf
        return softmax(scores)

    return decode


def greedy(law):
    """All mass on the most probable token, the first of tied ones."""
    law = np.asarray(law, float)
    return np.eye(law.size)[law.tolist().index(law.max())]


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


def threefry(key0, key1, x0, x1):
    """Threefry-2x32-20 in 64-bit integers, one operation after the other (Salmon et al. 2011)."""
    mask = 2**32 - 1
    x0, x1, key0, key1 = (np.asarray(v, np.int64) for v in (x0, x1, key0, key1))
    schedule = [key0, key1, key0 ^ key1 ^ 0x1BD11BDA]
    x0, x1 = (x0 + schedule[0]) & mask, (x1 + schedule[1]) & mask
    for i in range(20):
        x0 = (x0 + x1) & mask
        turn = [13, 15, 26, 6, 17, 29, 16, 24][i % 8]
        x1 = ((x1 << turn | x1 >> (32 - turn)) & mask) ^ x0
        if i % 4 == 3:
            n = i // 4 + 1
            x0 = (x0 + schedule[n % 3]) & mask
            x1 = (x1 + schedule[(n + 1) % 3] + n) & mask
    return x0, x1
