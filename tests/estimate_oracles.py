"""Slow truths for the tests of estimation: loops in float64 NumPy, SciPy and networkx."""

from __future__ import annotations

import zlib
from fractions import Fraction

import jax
import networkx as nx
import numpy as np
from scipy import optimize

import attnmarkov as am

SMALL_RATE = 1e-6  # how often a correct library fails one statistical test


def key_of(name: str) -> jax.Array:
    return jax.random.key(zlib.crc32(name.encode()))


def generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def well_posed(name, num_tokens, length, n, concentration=3.0):
    """A teacher with no rare token, uniform prompts, and labels."""
    teacher_key, prompt_key, label_key = jax.random.split(key_of(name), 3)
    p = am.random_transition_matrix(teacher_key, num_tokens, concentration=concentration)
    teacher = am.CCMC.from_transition_matrix(p)
    tokens = jax.random.randint(prompt_key, (n, length), 0, num_tokens)
    prompts = am.Prompts.from_tokens(tokens, num_tokens)
    return teacher, prompts, teacher.sample(label_key, prompts)


def random_data(rng, num_tokens, n, most=3):
    """Prompts on random small supports with any label that stands in them."""
    counts = np.zeros((n, num_tokens), np.int64)
    for row in counts:
        held = rng.choice(num_tokens, rng.integers(1, min(most, num_tokens) + 1), replace=False)
        row[held] = rng.integers(1, 4, held.size)
    last = np.array([rng.choice(np.flatnonzero(row)) for row in counts])
    y = np.array([rng.choice(np.flatnonzero(row)) for row in counts])
    return counts, last, y


def law(logits, counts, last):
    with np.errstate(divide="ignore"):
        z = logits[last] + np.log(counts)
    w = np.exp(z - z.max())
    return w / w.sum()


def negative_log_likelihood(logits, counts, last, y):
    return -sum(np.log(law(logits, c, k)[j]) for c, k, j in zip(counts, last, y, strict=True))


def gradient(logits, counts, last, y):
    g = np.zeros_like(logits)
    for c, k, j in zip(counts, last, y, strict=True):
        g[k] += law(logits, c, k)
        g[k, j] -= 1
    return g


def hessian(logits, counts, last):
    size = logits.shape[0]
    h = np.zeros((size, size, size))
    for c, k in zip(counts, last, strict=True):
        p = law(logits, c, k)
        h[k] += np.diag(p) - np.outer(p, p)
    return h


def pseudo_inverse_diagonal(information, prior=0.0):
    """Diagonals of pseudo-inverses of connected Laplacians plus a prior, in rational numbers.

    The entries off the diagonal of ``information`` (rows, K, K) are taken for exact. With
    ``J = 11ᵀ / K``, ``(L + prior + J)⁻¹ − J / (prior + 1)`` is the one on centred rows.
    """
    return np.array([_exact_diagonal(block, Fraction(float(prior))) for block in information])


def _exact_diagonal(block, prior):
    size = len(block)
    weight = [[Fraction(-float(block[a, b])) for b in range(size)] for a in range(size)]
    table = [[Fraction(1, size) - weight[a][b] for b in range(size)] for a in range(size)]
    for a in range(size):
        table[a][a] += sum(weight[a]) + prior
        table[a] += [Fraction(a == b) for b in range(size)]
    for column in range(size):  # Gauss-Jordan; positive definite, so that no pivot is zero
        table[column] = [x / table[column][column] for x in table[column]]
        for a in set(range(size)) - {column}:
            factor = table[a][column]
            pairs = zip(table[a], table[column], strict=True)
            table[a] = [x - factor * y for x, y in pairs]
    return [float(table[a][size + a] - 1 / (size * (prior + 1))) for a in range(size)]


def maximum(counts, last, y, prior=0.0):
    """Logits that minimise the penalised loss, by SciPy in float64."""
    size = counts.shape[1]

    def value(x):
        s = x.reshape(size, size)
        penalty = prior / 2 * (s**2).sum()
        return negative_log_likelihood(s, counts, last, y) + penalty

    def slope(x):
        s = x.reshape(size, size)
        return (gradient(s, counts, last, y) + prior * s).ravel()

    options = {"gtol": 1e-9, "maxiter": 2000}
    x = optimize.minimize(value, np.zeros(size**2), jac=slope, method="BFGS", options=options).x
    assert abs(slope(x)).max() < 1e-5
    return x.reshape(size, size)


def components(counts, last):
    """Labels of the co-occurrence components: the least token of each."""
    size = counts.shape[1]
    labels = np.zeros((size, size), int)
    for k in range(size):
        graph = nx.Graph()
        graph.add_nodes_from(range(size))
        for c in counts[last == k]:
            held = np.flatnonzero(c)
            graph.add_edges_from((held[0], b) for b in held[1:])
        for part in nx.connected_components(graph):
            labels[k, list(part)] = min(part)
    return labels


def finite_maximum(counts, last, y):
    """Whether each token's component is strongly connected in the win graph."""
    size = counts.shape[1]
    labels = components(counts, last)
    finite = np.zeros((size, size), bool)
    for k in range(size):
        graph = nx.DiGraph()
        graph.add_nodes_from(range(size))
        for c, j in zip(counts[last == k], y[last == k], strict=True):
            graph.add_edges_from((a, j) for a in np.flatnonzero(c))
        for root in set(labels[k]):
            part = np.flatnonzero(labels[k] == root)
            finite[k, part] = nx.is_strongly_connected(graph.subgraph(part))
    return finite


def centre(logits, labels):
    """Subtract from every token the mean of its component."""
    out = np.array(logits, np.float64)
    for k in range(len(out)):
        for root in set(labels[k]):
            out[k, labels[k] == root] -= out[k, labels[k] == root].mean()
    return out
