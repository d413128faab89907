"""Teachers, students, and the errors that theory predicts."""

import itertools
import json
from typing import Any

import estimate_oracles as oracle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr
from scipy import stats

import attnmarkov as am
from attnmarkov.estimate import Status, _students
from attnmarkov.estimate._embedding import coordinates_of
from attnmarkov.estimate._students import (
    Data,
    Source,
    draw_teachers,
    fit_students,
    population,
    room_for,
)
from attnmarkov.estimate.teacher_student import (
    learning_exponents,
    learning_groups,
    teacher_student,
)
from attnmarkov.estimate.win_graph import comparisons_of, separable

TAIL = oracle.SMALL_RATE / 2
KEY = jax.random.key(11)
SMALL: dict[str, Any] = {
    "num_tokens": 3,
    "num_prompts": (300, 900),
    "length": 6,
    "num_teachers": 3,
    "num_test_prompts": 1024,
    "num_information_prompts": 2**15,
}


@pytest.fixture(scope="module")
def learned():
    return teacher_student(KEY, num_replicates=100, **SMALL)


def assert_risk(dataset, rank, order):
    """Twice n times the risk is χ² with r degrees, up to ``order`` that is left at finite n."""
    n = dataset["num_prompts"].values[:, None, None]
    for risks in (n * dataset["excess_risk"].values).reshape(len(n), -1):
        shape = risks.size * rank / 2
        low, high = stats.gamma.ppf([TAIL, 1 - TAIL], shape) / risks.size
        assert (1 - order) * low < risks.mean() < (1 + order) * high


def assert_ratio(dataset, variable, order):
    """The mean error over its prediction is 1 within its interval (rate SMALL_RATE) and order."""
    ratio = (dataset[variable] / dataset[f"predicted_{variable}"]).values
    for values in ratio.reshape(len(ratio), -1):
        half = stats.norm.isf(TAIL) * values.std(ddof=1) / np.sqrt(values.size)
        assert abs(values.mean() - 1) < half + order


def test_errors_are_those_predicted(learned):
    assert dict(learned.sizes) == {"config": 2, "teacher": 3, "replicate": 100}
    expected = np.array([[0.01], [1 / 300]]) * np.ones(3)
    np.testing.assert_allclose(learned["predicted_excess_risk"], expected)
    traces = learned["predicted_squared_error"] * learned["num_prompts"]
    np.testing.assert_allclose(traces[0], traces[1], rtol=1e-9)
    assert_risk(learned, 6, 0.05)  # terms of order 1/n: up to 4 % at n = 300
    assert_ratio(learned, "squared_error", 0.05)
    assert (learned["status"] == Status.CONVERGED).all()
    assert (learned["num_parameters"] == 6).all()
    assert (learned["iterations"] > 0).all()
    assert (learned["share_without_maximum"] == 0).all()
    found = learning_exponents(learned)
    assert found["predicted_slope"].values.tolist() == [-1]
    for name in ("excess_risk", "squared_error"):
        off = abs(found[f"{name}_slope"].values + 1)
        assert (off < stats.norm.isf(TAIL) * found[f"{name}_slope_error"].values + 0.05).all()


def test_a_student_is_what_fit_and_excess_risk_say():
    teachers = draw_teachers(KEY, 1, 3, 8.0)
    source, n, fits = Source("uniform", 6), 300, 300
    known = population(teachers, source, None, jax.random.key(1), 2**12)
    keys = jax.random.split(jax.random.key(2), fits)
    logits = jnp.asarray(np.repeat(teachers.logits, fits, axis=0))
    data = _students._data(logits, keys, None, source, n, 1024)
    found = fit_students(
        teachers,
        known,
        np.zeros(fits, int),
        keys,
        source=source,
        num_prompts=n,
        num_test_prompts=1024,
        room=1024,
    )
    teacher = am.CCMC(logits[0])
    for i in (0, 57):
        prompts = jax.tree.map(lambda x, i=i: x[i], data.train)
        student = am.fit(prompts, data.y[i])
        np.testing.assert_allclose(found["nll"][i], student.nll, rtol=1e-5)
        gap = np.asarray(student.model.logits - teacher.logits)
        np.testing.assert_allclose(found["squared_error"][i], (gap**2).sum(), rtol=1e-3)
        fresh = jax.tree.map(lambda x, i=i: x[i], data.test)
        assert not np.array_equal(fresh.counts[:n], prompts.counts)
        risk = am.excess_risk(teacher, student.model, fresh)
        np.testing.assert_allclose(found["excess_risk"][i], risk, rtol=1e-3)


def test_draws_depend_on_their_own_config_teacher_and_replicate_alone(learned):
    """Nor on how fits are padded (a function's prompts are not) and cut into blocks."""

    def uniform(key, n, length, size):
        return am.prompts.uniform(key, n, length, size)

    one = _students._bytes(3, 6, 900, 1024)
    some = {**SMALL, "num_prompts": 900, "num_teachers": 2}
    part = teacher_student(
        KEY, num_replicates=4, distribution={"uniform": uniform}, max_bytes=3 * one, **some
    )
    whole = learned.isel(config=[1], teacher=slice(2), replicate=slice(4))
    np.testing.assert_allclose(part["nll"], whole["nll"], rtol=1e-5)
    np.testing.assert_allclose(part["excess_risk"], whole["excess_risk"], rtol=1e-2)
    np.testing.assert_allclose(part["predicted_squared_error"], whole["predicted_squared_error"])
    values = learned["nll"].values
    assert len(np.unique(values)) == values.size
    # More prompts are not the fewer ones and some: sums over n would correlate at √(300/900).
    few, many = values.reshape(2, -1)
    half = stats.norm.isf(TAIL) / np.sqrt(few.size)
    means = np.repeat(values.mean(-1), 100, axis=-1)  # of each teacher
    assert abs(np.corrcoef(few - means[0], many - means[1])[0, 1]) < half < 0.5


def test_dataset_describes_itself_and_is_stored(learned, tmp_path):
    assert learned.attrs["num_test_prompts"] == 1024
    assert learned.attrs["prior"] == "none"
    assert json.loads(learned.attrs["key"]) == ["threefry2x32", [0, 11]]
    assert learned["distribution"].values.tolist() == ["uniform"] * 2
    assert learned["embedding_dim"].values.tolist() == [0, 0]
    learned.to_zarr(tmp_path / "data.zarr", zarr_format=3, consolidated=False)
    again = xr.open_zarr(tmp_path / "data.zarr", consolidated=False)
    xr.testing.assert_equal(again.load(), learned)
    assert again.attrs == learned.attrs


def sequences(distribution, length, p):
    """Every prompt with its probability."""
    size = len(p)
    values, vectors = np.linalg.eig(p.T)
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    stationary = stationary / stationary.sum()
    zipf = 1 / np.arange(1, size + 1)
    for tokens in itertools.product(range(size), repeat=length):
        if distribution == "uniform":
            chance = size**-length
        elif distribution == "zipf":
            chance = np.prod(zipf[list(tokens)] / zipf.sum())
        elif distribution == "markov":
            chance = stationary[tokens[0]]
            chance *= np.prod([p[a, b] for a, b in itertools.pairwise(tokens)])
        else:
            possible = len(list(itertools.permutations(range(size), length)))
            chance = (len(set(tokens)) == length) / possible
        yield tokens, chance


def exact_information(logits, distribution, length, gamma=1.0):
    """Of one sample, (K, K, K), by enumeration in float64."""
    s = np.asarray(logits, np.float64)
    p = np.exp(s) / np.exp(s).sum(1, keepdims=True)
    out = np.zeros((len(s),) * 3)
    for tokens, chance in sequences(distribution, length, p):
        weights = np.zeros(len(s))
        np.add.at(weights, list(tokens), gamma ** np.arange(length - 1, -1, -1.0))
        law = oracle.law(s, weights, tokens[-1])
        out[tokens[-1]] += chance * (np.diag(law) - np.outer(law, law))
    return out


def exact_trace(information):
    return np.trace(np.linalg.pinv(information, hermitian=True), axis1=1, axis2=2).sum()


@pytest.mark.parametrize("distribution", _students.DISTRIBUTIONS)
def test_information_against_enumeration(distribution):
    """2**15 prompts know each entry within a few per cent, and the trace better."""
    teachers = draw_teachers(KEY, 2, 3, 4.0)
    known = population(teachers, Source(distribution, 3), None, KEY, 2**15)
    assert known.rank.tolist() == [6, 6]
    assert (known.components == 0).all()
    for logits, trace in zip(teachers.logits, known.trace, strict=True):
        exact = exact_trace(exact_information(logits, distribution, 3))
        np.testing.assert_allclose(trace, exact, rtol=0.03)


def test_information_under_a_context():
    teachers = draw_teachers(KEY, 1, 3, 4.0)
    known = population(teachers, Source("uniform", 4), am.DecayContext(0.5), KEY, 2**15)
    exact = exact_trace(exact_information(teachers.logits[0], "uniform", 4, gamma=0.5))
    np.testing.assert_allclose(known.trace[0], exact, rtol=0.03)


def test_information_of_a_narrow_embedding():
    teachers = draw_teachers(KEY, 1, 4, 4.0, embedding_dim=2)
    known = population(teachers, Source("uniform", 3), None, KEY, 2**15)
    assert known.rank.tolist() == [4]
    assert teachers.embedding is not None
    e = np.asarray(teachers.embedding[0], np.float64)
    centred = np.eye(4) - 0.25
    # vec(S) = jacobian vec(W), S[k, j] = e_jᵀ W e_k with centred rows
    jacobian = np.einsum("kq,ij,jp->kipq", e, centred, e).reshape(16, 4)
    information = np.zeros((16, 16))
    for k, block in enumerate(exact_information(teachers.logits[0], "uniform", 3)):
        information[4 * k : 4 * k + 4, 4 * k : 4 * k + 4] = block
    inverse = np.linalg.inv(jacobian.T @ information @ jacobian)
    exact = np.trace(jacobian @ inverse @ jacobian.T)
    np.testing.assert_allclose(known.trace[0], exact, rtol=0.03)


def test_teachers():
    few, many = (draw_teachers(KEY, number, 5, 8.0, 3) for number in (2, 12))
    np.testing.assert_array_equal(few.logits, many.logits[:2])
    assert few.is_narrow
    assert many.embedding is not None
    np.testing.assert_allclose(many.logits.sum(-1), 0, atol=1e-5)
    spread = np.sqrt((many.logits**2).mean((1, 2)))
    dirichlet = draw_teachers(KEY, 12, 5, 8.0).logits
    np.testing.assert_allclose(spread, spread[0], rtol=1e-5)
    np.testing.assert_allclose(spread[0], dirichlet.std(), rtol=0.25)
    for s, e in zip(many.logits, many.embedding, strict=True):
        queries = np.linalg.qr(e)[0]
        np.testing.assert_allclose(s - queries @ (queries.T @ s), 0, atol=1e-5)
        keys = np.linalg.qr(e - e.mean(0))[0]
        np.testing.assert_allclose(s - s @ keys @ keys.T, 0, atol=1e-5)
    wide = draw_teachers(KEY, 2, 5, 8.0, 7)
    assert not wide.is_narrow
    np.testing.assert_array_equal(wide.logits, dirichlet[:2])


def test_students_know_the_context():
    """A student that took the counts for the weights would miss by far more than the error."""
    data = teacher_student(
        KEY,
        num_tokens=3,
        num_prompts=800,
        length=5,
        context={"decay": am.DecayContext(0.3)},
        concentration=2.0,
        num_teachers=2,
        num_replicates=60,
        num_test_prompts=512,
        num_information_prompts=2**14,
    )
    assert data["context"].values.tolist() == ["decay"]
    assert (data["status"] == Status.CONVERGED).all()
    assert_ratio(data, "squared_error", 0.1)
    assert_risk(data, 6, 0.1)


def test_labels_follow_the_context():
    logits = jnp.asarray([[[0.0, 0.5, -0.5], [0.3, -0.3, 0.0], [1.0, -1.0, 0.0]]])
    prompts = am.Prompts.from_tokens([[0, 1, 2, 1, 0, 2]] * 20_000, 3)
    batch = jax.tree.map(lambda x: x[None], prompts)
    y = np.asarray(_students._emit(logits, KEY[None], batch, am.DecayContext(0.5)))[0]
    weights = np.array([0.5**5 + 0.5, 0.5**4 + 0.25, 0.5**3 + 1])
    law = oracle.law(np.asarray(logits[0], float), weights, 2)
    assert stats.chisquare(np.bincount(y, minlength=3), len(y) * law).pvalue > oracle.SMALL_RATE


def test_embedded_students_learn_the_same_from_the_same_data(learned):
    """With d >= K students learn W by another solver, and end where those of S do."""
    some = {**SMALL, "num_prompts": 900}
    data = teacher_student(KEY, num_replicates=10, embedding_dim=3, solver="lbfgs", **some)
    whole = learned.isel(config=[1], replicate=slice(10))
    for name in ("nll", "predicted_squared_error", "predicted_excess_risk", "status"):
        np.testing.assert_allclose(data[name], whole[name], rtol=1e-5)
    for name in ("excess_risk", "squared_error"):
        np.testing.assert_allclose(data[name], whole[name], rtol=0.01)


def test_narrow_students():
    data = teacher_student(
        KEY,
        num_tokens=4,
        num_prompts=500,
        length=6,
        embedding_dim=2,
        solver="lbfgs",
        num_teachers=2,
        num_replicates=100,
        num_test_prompts=512,
        num_information_prompts=2**14,
    )
    assert (data["num_parameters"] == 4).all()
    np.testing.assert_allclose(data["predicted_excess_risk"], 4 / 1000)
    assert_risk(data, 4, 0.06)
    assert_ratio(data, "squared_error", 0.06)


FEW: dict[str, Any] = {
    "num_tokens": 3,
    "length": 4,
    "num_teachers": 2,
    "num_replicates": 50,
    "num_test_prompts": 64,
    "num_information_prompts": 2**12,
}


def test_fits_without_a_maximum_have_no_error():
    data = teacher_student(KEY, num_prompts=(12, 40), **FEW)
    status = data["status"].values
    assert len(np.unique(status)) > 2  # separated, and not identified
    for name in ("excess_risk", "squared_error"):
        np.testing.assert_array_equal(np.isnan(data[name]), status != Status.CONVERGED)
    unfinished = (status != Status.CONVERGED) & (status != Status.NOT_IDENTIFIED)
    np.testing.assert_array_equal(np.isnan(data["nll"]), unfinished)
    lost = (status != Status.CONVERGED).mean(-1)
    np.testing.assert_allclose(data["share_without_maximum"], lost)
    assert 0 < lost.min() < lost.max()
    assert (data["num_parameters"].values[status == Status.NOT_IDENTIFIED] < 6).all()
    assert np.isnan(learning_exponents(data)["excess_risk_slope"]).all()


def test_with_a_prior_every_fit_has_a_maximum():
    data = teacher_student(KEY, num_prompts=12, prior=1.0, **FEW)
    assert np.isfinite(data["squared_error"]).all()
    assert (data["share_without_maximum"] == 0).all()


def test_prompts_that_identify_a_part_teach_that_part():
    def blocks(key, n, length, size):
        return am.prompts.from_supports(key, n, length, [[0, 1], [2, 3]], size)

    data = teacher_student(
        KEY,
        num_tokens=4,
        num_prompts=600,
        length=6,
        distribution={"two blocks": blocks},
        num_teachers=2,
        num_replicates=100,
        num_test_prompts=512,
        num_information_prompts=2**14,
    )
    assert (data["status"] == Status.NOT_IDENTIFIED).all()
    assert (data["num_parameters"] == 4).all()
    np.testing.assert_allclose(data["predicted_excess_risk"], 4 / 1200)
    assert_risk(data, 4, 0.05)
    assert_ratio(data, "squared_error", 0.05)


def test_narrow_separation_is_decided_by_linear_programs():
    """e = (−1, 0, 1): the margin of token a over b after k is w (e_a − e_b) e_k."""
    prompts = am.Prompts.from_tokens([[0, 1, 2]] * 3, 3)
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), prompts)
    y = jnp.array([[2, 2, 2], [2, 0, 2]])  # separated; not, though token 1 never comes
    found = {k: np.array([1.0, 2.0]) for k in ("excess_risk", "squared_error", "nll")}
    found |= {"status": np.zeros(2, np.int32), "is_doubtful": np.ones(2, bool)}
    embedding = np.array([[[-1.0], [0.0], [1.0]]] * 2)
    _students._mark_separated(found, Data(batch, y, batch), embedding)
    assert found["status"].tolist() == [Status.SEPARATED, 0]
    np.testing.assert_array_equal(found["squared_error"], [np.nan, 2])
    found |= {"status": np.zeros(2, np.int32), "is_doubtful": np.zeros(2, bool)}
    _students._mark_separated(found, Data(batch, y, batch), embedding)
    assert found["status"].tolist() == [0, 0]


def test_narrow_fits_are_checked_for_separation():
    """Few prompts: some fits are separated, and others only doubtful."""
    teachers = draw_teachers(KEY, 1, 3, 4.0, embedding_dim=1)
    source, n, fits = Source("uniform", 3), 10, 40
    known = population(teachers, source, None, KEY, 2**10)
    keys = jax.random.split(KEY, fits)
    which = np.zeros(fits, int)
    some = {"source": source, "num_prompts": n, "num_test_prompts": 16, "solver": "lbfgs"}
    found = fit_students(teachers, known, which, keys, **some)
    data = _students._data(jnp.asarray(teachers.logits[which]), keys, None, source, n, 16)
    assert teachers.embedding is not None
    coordinates = coordinates_of(teachers.embedding[0])
    train = [np.asarray(x) for x in (data.train.counts, data.train.last, data.y)]
    expected = [separable(comparisons_of(*(x[i] for x in train)), coordinates) for i in range(fits)]
    np.testing.assert_array_equal(found["status"] == Status.SEPARATED, expected)
    assert np.isnan(found["excess_risk"][expected]).all()
    assert 0 < (found["status"] == Status.SEPARATED).mean() < 1


def test_narrow_embeddings_without_coverage_have_no_error():
    teachers = draw_teachers(KEY, 1, 3, 4.0, embedding_dim=2)
    assert teachers.embedding is not None
    components = np.tile(np.arange(3), (3, 1))
    rank, trace = _students._narrow(np.zeros((3, 3, 3)), components, teachers.embedding[0])
    assert rank == -1
    assert np.isnan(trace)


def test_rooms():
    assert room_for(300, 4, 100) == 1024
    assert room_for(256, 4, 100) == 256
    assert room_for(5, 4, 1) == 256
    assert room_for(17_000, 8, 1000) == 17_000  # padding to 65,536 would cost more
    for n in (1, 257, 1025, 5000):
        assert room_for(n, 4, 100) >= n


def test_blocks_fit_in_memory():
    """XLA asks for no more than was reckoned, and for no less than a third of it."""
    n, size, block, length = 1024, 4, 8, 10

    def of(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((block, *shape), dtype)

    batch: am.Prompts = am.Prompts(of(n, size), of(n))  # type: ignore[arg-type]
    logits = of(size, size, dtype=jnp.float32)
    data = Data(batch, of(n), batch)  # type: ignore[arg-type]
    number = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = (logits, None, of(size, size), of(), data, number, None, None)
    compiled = _students._learn.lower(*arguments, solver="newton").compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    asked = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    reckoned = block * _students._bytes(size, length, n, n)
    assert asked < reckoned < 3 * asked


def test_float64():
    with jax.enable_x64(True):
        data = teacher_student(
            jax.random.key(3),
            num_tokens=2,
            num_prompts=256,
            length=4,
            num_teachers=1,
            num_replicates=20,
            num_test_prompts=256,
            num_information_prompts=2**10,
        )
    assert (data["status"] == Status.CONVERGED).all()
    assert_ratio(data, "excess_risk", 0.1)


def synthetic(n, constant=6.0, slope=-1.0, **coords):
    n = np.asarray(n, float)
    noise = np.array([[0.8, 1.2], [0.9, 1.1]])
    errors = constant * n[:, None, None] ** slope * noise
    prediction = np.repeat(constant / n[:, None], 2, axis=1)
    names = ("excess_risk", "squared_error")
    data = dict.fromkeys(names, (("config", "teacher", "replicate"), errors))
    data |= {f"predicted_{k}": (("config", "teacher"), prediction) for k in names}
    columns = {k: ("config", np.full(len(n), v)) for k, v in coords.items()}
    return xr.Dataset(data, {"num_prompts": ("config", n), **columns})


def test_learning_exponents():
    parts = [
        synthetic([400, 100, 200], num_tokens=3),
        synthetic([300, 100], slope=-0.7, num_tokens=4),
        synthetic([100], num_tokens=5),
    ]
    data = xr.concat(parts, "config")
    found = learning_exponents(data)
    np.testing.assert_allclose(found["excess_risk_slope"], [-1, -0.7, np.nan], rtol=1e-6)
    assert found["num_tokens"].values.tolist() == [3, 4, 5]
    assert found["num_sizes"].values.tolist() == [3, 2, 0]
    error = np.std([0.8, 1.2, 0.9, 1.1], ddof=1) / 2
    np.testing.assert_allclose(found["squared_error_slope_error"][1], error * 2**0.5 / np.log(3))
    assert [index.tolist() for _, index in learning_groups(data)] == [[1, 2, 0], [4, 3], [5]]
    spoilt = data.copy(deep=True)
    spoilt["excess_risk"][0, 0, 0] = np.nan  # a quarter of the fits with 400 prompts
    assert learning_exponents(spoilt)["num_sizes"].values.tolist() == [2, 2, 0]
    generous = learning_exponents(spoilt, most_without_maximum=0.25)
    assert generous["num_sizes"].values.tolist() == [3, 2, 0]


def kl(teacher, student, weights, last):
    total = 0.0
    for w, k in zip(weights, last, strict=True):
        p, q = oracle.law(teacher, w, k), oracle.law(student, w, k)
        total += (p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()
    return total / len(last)


@pytest.mark.parametrize("distance", [1.0, 1e-3])
def test_excess_risk_under_a_context(distance):
    rng = oracle.generator("risk under a context")
    teacher = np.asarray(rng.normal(size=(4, 4)), np.float32)
    student = teacher + np.asarray(distance * rng.normal(size=(4, 4)), np.float32)
    tokens = rng.integers(0, 4, (50, 7))
    prompts = am.Prompts.from_tokens(tokens, 4)
    models = am.CCMC(jnp.asarray(teacher)), am.CCMC(jnp.asarray(student))
    weights = np.zeros((50, 4))
    for row, ids in zip(weights, tokens, strict=True):
        np.add.at(row, ids, 0.4 ** np.arange(6, -1, -1.0))
    exact = kl(teacher.astype(float), student.astype(float), weights, tokens[:, -1])
    context = am.DecayContext(0.4)
    np.testing.assert_allclose(am.excess_risk(*models, prompts, context=context), exact, rtol=1e-4)
    full = am.excess_risk(*models, prompts, context=am.FullContext())
    np.testing.assert_allclose(full, am.excess_risk(*models, prompts), rtol=1e-6)
    assert abs(float(full) / exact - 1) > 0.01

    def risk(prompts):
        return am.excess_risk(*models, prompts, context=context)

    halves = jax.tree.map(lambda x: x.reshape(2, 25, *x.shape[1:]), prompts)
    np.testing.assert_allclose(jax.jit(jax.vmap(risk))(halves).mean(), exact, rtol=1e-4)
    with pytest.raises(ValueError, match="context: expected a Context"):
        am.excess_risk(*models, prompts, context="decay")  # type: ignore[arg-type]
    counts = am.Prompts.from_counts(prompts.counts, prompts.last)
    with pytest.raises(ValueError, match="needs token ids, but only the counts"):
        am.excess_risk(*models, counts, context=context)


def half(key, n, length, size):
    return am.prompts.uniform(key, n // 2, length, size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": 1}, "num_tokens: must be at least 2, got 1"),
        ({"num_tokens": ()}, "num_tokens: expected at least one value, got none"),
        ({"num_prompts": (10, 0)}, "num_prompts: must be at least 1, got 0"),
        ({"num_prompts": (10, 10)}, "num_prompts: 10 is given twice"),
        ({"length": 1}, "length: must be at least 2, got 1"),
        ({"length": 2.5}, "length: expected an integer, got 2.5"),
        ({"distribution": "normal"}, "distribution: unknown distribution 'normal'; known: uniform"),
        ({"distribution": half}, "distribution: give a function in a mapping"),
        ({"distribution": {}}, "distribution: expected at least one value, got none"),
        ({"distribution": {3: half}}, "distribution: labels are strings, got 3"),
        (
            {"distribution": {"half": half}},
            r"distribution: 'half' must return Prompts .*\(2, 4\); got \(1, 4\)",
        ),
        (
            {"distribution": {"none": lambda key, n, length, size: key}},
            "distribution: 'none' must return Prompts",
        ),
        (
            {"distribution": "without_replacement", "length": 5},
            "length: 5 distinct tokens cannot be drawn from a vocabulary of 4",
        ),
        ({"embedding_dim": (None, 0), "solver": "lbfgs"}, "embedding_dim: must be at least 1"),
        ({"embedding_dim": 2}, "solver: newton learns the logits S, not W"),
        (
            {"embedding_dim": 2, "solver": "lbfgs", "context": am.DecayContext(0.5)},
            r"context: 'DecayContext\(.*\)' cannot be combined with an embedding_dim",
        ),
        (
            {"embedding_dim": 2, "solver": "lbfgs", "prior": 1.0},
            "prior: cannot be combined with an embedding_dim",
        ),
        ({"context": "window"}, "context: expected 'full' or a Context .* got 'window'"),
        ({"context": ("full", 3)}, "context: expected 'full' or a Context .* got 3"),
        ({"context": ("full", "full")}, "context: 'full' is given twice"),
        ({"context": am.DecayContext(1.5)}, "gamma: .* 1.5"),
        (
            {"context": {"full": am.DecayContext(0.5)}},
            r"context: the label 'full' means FullContext\(\)",
        ),
        (
            {"context": {"far": am.LagContext([0.0] * 12 + [1.0])}},
            "context: 'far' gives no position of a prompt of 10 tokens a finite weight",
        ),
        ({"solver": "sgd"}, "solver: unknown solver 'sgd'; known: newton, lbfgs, adam"),
        ({"solver": optax.sgd(0.1)}, "solver: give an optax.GradientTransformation in a mapping"),
        ({"prior": -1.0}, "prior: must be a finite precision of at least 0"),
        ({"concentration": 0.0}, "concentration: must be one number above 0, got 0.0"),
        ({"num_teachers": 0}, "num_teachers: must be at least 1, got 0"),
        ({"num_replicates": 0}, "num_replicates: must be at least 1, got 0"),
        ({"num_test_prompts": 0}, "num_test_prompts: must be at least 1, got 0"),
        ({"num_information_prompts": 0}, "num_information_prompts: must be at least 1, got 0"),
        ({"max_bytes": 0}, "max_bytes: must be at least 1, got 0"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        teacher_student(KEY, **change)


def test_bad_key():
    with pytest.raises(ValueError, match="key: expected a typed key"):
        teacher_student(0)  # type: ignore[arg-type]
