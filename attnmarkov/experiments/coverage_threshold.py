"""Coverage threshold: learning stops being consistent just where a co-occurrence graph splits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnmarkov.chains import random_transition_matrix
from attnmarkov.estimate import Status, excess_risk, fisher_information, fit
from attnmarkov.estimate.graphs import component_projector
from attnmarkov.estimate.laplacian import eliminate, pseudo_inverse_diagonal, trace_against
from attnmarkov.experiments._statistics import INTERVAL_99_99, binomial_interval, weighted_line
from attnmarkov.model import CCMC
from attnmarkov.prompts import Prompts
from attnmarkov.prompts import uniform as uniform_prompts
from attnmarkov.sweep import Claim, Experiment, Layout, Verdict

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

_SOURCE = "From Self-Attention to Markov Models (ICML 2024), consistency"
_BAD = 0.01  # share of fits without a maximum that spoils a mean
_FAR = 40.0  # times its prediction: no error of a connected row comes as far by chance


@dataclass(frozen=True, kw_only=True)
class CoverageThreshold(Experiment):
    """Prompts over supports, with teachers of Dirichlet rows.

    In the family "bridge" a prompt leaves out the first token or the last one, and with
    probability ε, the bridge, neither: the first and the last token meet in such prompts alone.
    At ε = 0 the graphs of these two rows split, and two contrasts are lost; the other rows'
    graphs hold together, and teach even what never meets. In the family "random" every
    replicate has random supports and a teacher of its own.
    """

    name: ClassVar[str] = "coverage-threshold"
    summary: ClassVar[str] = "a row is learned if and only if its co-occurrence graph is connected"
    block_size: ClassVar[int] = 100
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "full": {
            "num_tokens": 5,
            "bridges": (0.0, 0.05, 0.2, 0.6),
            "num_prompts": (8000, 16000, 32000, 64000),
            "num_replicates": 1000,
        }
    }

    num_tokens: int = 4
    """Vocabulary size K, at least 3."""
    bridges: tuple[float, ...] = (0.0, 0.2, 0.6)
    """Probabilities ε of prompts in which the first and the last token may meet; one is 0."""
    num_prompts: tuple[int, ...] = (2000, 5000, 12500)
    """Numbers of prompts n, at least three; random supports have the largest."""
    num_supports: int = 4
    """Supports of a replicate of the family "random"."""
    length: int = 10
    """Tokens per prompt."""
    concentration: float = 6.0
    """Dirichlet parameter of the teachers' rows."""
    num_teachers: int = 4
    """Teachers of the family "bridge"; replicates take turns."""
    num_test_prompts: int = 2048
    """Fresh prompts of uniform tokens on which a fit's excess risk is measured."""
    num_replicates: int = 400
    """Fits per grid point."""

    def validate(self) -> None:
        """Raise ``ValueError`` for parameters out of range."""
        super().validate()
        if self.num_tokens < 3:
            raise ValueError(f"num_tokens: a bridge needs at least 3, got {self.num_tokens}")
        if 0 not in self.bridges or not all(0 <= b <= 1 for b in self.bridges):
            raise ValueError(f"bridges: expected 0 and probabilities, got {self.bridges}")
        if len(set(self.num_prompts)) < 3 or min(self.num_prompts) < 1:
            raise ValueError(
                f"num_prompts: expected three or more sizes of at least 1, got {self.num_prompts}"
            )
        if self.length < 2:
            raise ValueError(f"length: one token teaches nothing; at least 2, got {self.length}")
        if not self.concentration > 0:
            raise ValueError(f"concentration: must be above 0, got {self.concentration}")
        for name in ("num_supports", "num_teachers", "num_test_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")

    def configs(self) -> list[dict[str, Any]]:
        """Bridges and numbers of prompts, then the random supports."""
        sizes = sorted(set(self.num_prompts))
        bridges = [
            {"family": "bridge", "bridge": b, "num_prompts": n}
            for b in sorted(set(self.bridges))
            for n in sizes
        ]
        return [*bridges, {"family": "random", "bridge": -1.0, "num_prompts": sizes[-1]}]

    def layout(self) -> Layout:
        """Errors by row and on the whole, what is predicted of them, and the fit's status."""
        rows = ("squared_error", "identified_error", "predicted_error", "lost")
        return {
            **dict.fromkeys(rows, (("row",), "float64")),
            **dict.fromkeys(("excess_risk", "predicted_risk", "floor"), ((), "float64")),
            "connected": (("row",), "bool"),
            "num_identifiable": ((), "int32"),
            "status": ((), "int32"),
        }

    def coords(self) -> dict[str, np.ndarray]:
        """The rows."""
        return {"row": np.arange(self.num_tokens)}

    def simulate(
        self, config: dict[str, Any], key: jax.Array, replicates: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Fit the given replicates. Random supports and teachers depend on seed and replicate."""
        size, seed = self.num_tokens, jax.random.key(self.seed)
        if config["family"] == "bridge":
            held = np.ones((3, size), bool)
            held[0, 0] = held[1, -1] = False
            probs = np.array([(1 - config["bridge"]) / 2] * 2 + [config["bridge"]])
            teacher_of = replicates % self.num_teachers
            supports = np.broadcast_to(held, (len(replicates), *held.shape))
        else:
            probs = np.full(self.num_supports, 1 / self.num_supports)
            teacher_of = self.num_teachers + replicates
            supports = _random_supports(
                seed, jnp.asarray(replicates), self.num_supports, self.num_tokens
            )
        return {
            name: np.asarray(values)
            for name, values in _replicates(
                key,
                seed,
                jnp.asarray(replicates),
                jnp.asarray(teacher_of),
                jnp.asarray(supports),
                jnp.asarray(probs, float),
                self.concentration,
                num_prompts=int(config["num_prompts"]),
                length=self.length,
                num_test_prompts=self.num_test_prompts,
            ).items()
        }

    def bridge(self, dataset: xr.Dataset, probability: float) -> xr.Dataset:
        """The part of the family "bridge" with this probability, by increasing n."""
        of = (dataset["family"] == "bridge") & (dataset["bridge"] == probability)
        return dataset.isel(config=np.flatnonzero(of))

    def claims(self, dataset: xr.Dataset) -> list[Claim]:
        """What is learned with each bridge, what is lost without one, and random supports."""
        out: list[Claim] = []
        k = self.num_tokens
        for probability in sorted(set(self.bridges)):
            part = self.bridge(dataset, probability)
            if int(part["done"].sum("replicate").min()) < 2:
                continue
            name = f"bridge {probability:g}" if probability else "no bridge"
            bad = float((~part["status"].isin([Status.CONVERGED, Status.NOT_IDENTIFIED])).mean())
            note = f"; {bad:.1%} of fits without a maximum" if bad else ""
            identified = part["identified_error"].sum("row").values
            ratio = identified / part["predicted_error"].sum("row").values
            text = "squared error of identifiable contrasts, in units of tr(I⁺)/n, as n grows"
            out.append(self._limit(f"{name}: {text}{note}", part, ratio, bad))
            if probability:
                ratio = part["excess_risk"].values / part["predicted_risk"].values
                text = "excess risk on prompts of all tokens, in units of tr(J I⁺)/2n, as n grows"
            else:
                ratio = part["excess_risk"].values / part["floor"].values
                text = "excess risk on prompts of all tokens, in units of its floor, as n grows"
            out.append(self._limit(f"{name}: {text}{note}", part, ratio, bad))
            expected = k * (k - 1) - 2 * (probability == 0)
            found = part["num_identifiable"].values == expected
            low, high = binomial_interval(int(found.sum()), found.size, 1e-4)
            text = f"{name}: share of fits that identify {expected} of {k * (k - 1)} contrasts"
            verdict: Verdict = "pass" if found.all() else "fail"
            out.append(
                Claim(self.name, text, _SOURCE, 1.0, float(found.mean()), (high - low) / 2, verdict)
            )
        return [*out, *self._random(dataset)]

    def _limit(self, text: str, part: xr.Dataset, ratio: np.ndarray, bad: float) -> Claim:
        """Whether the mean ratio goes to 1: ``a`` of ``a + b/n`` by weighted least squares."""
        n = part["num_prompts"].values.astype(float)
        mean = np.nanmean(ratio, axis=1)
        error = np.nanstd(ratio, axis=1, ddof=1) / np.sqrt((~np.isnan(ratio)).sum(axis=1))
        (a, _), (a_error, _) = weighted_line(1 / n, mean, error)
        half = INTERVAL_99_99 * a_error
        verdict: Verdict = "pass" if abs(a - 1) <= half else "fail"
        if bad > _BAD or not half <= 0.15:  # NaN too
            verdict = "inconclusive"
        return Claim(self.name, text, _SOURCE, 1.0, a, half, verdict)

    def _random(self, dataset: xr.Dataset) -> list[Claim]:
        part = dataset.isel(config=np.flatnonzero(dataset["family"] == "random"))
        good = part["status"].isin([Status.CONVERGED, Status.NOT_IDENTIFIED]).values
        connected = part["connected"].values[good]
        error, lost = part["squared_error"].values[good], part["lost"].values[good]
        bar = _FAR * part["predicted_error"].values[good]
        tested = connected | (lost > bar)  # a smaller loss is too near to nothing to be seen
        learned = error < bar
        wrong = int((tested & (learned != connected)).sum())
        text = (
            f"random supports: rows learned though split, or not learned though connected, of "
            f"{int(tested.sum())} ({int(connected.sum())} connected)"
        )
        both = tested.any() and connected.any() and not connected.all()
        verdict: Verdict = "inconclusive" if not both else "pass" if wrong == 0 else "fail"
        return [Claim(self.name, text, _SOURCE, 0, wrong, None, verdict)]

    def figures(self, dataset: xr.Dataset) -> dict[str, Figure]:
        """Errors against n by bridge; each row of the random supports against its prediction."""
        from matplotlib.figure import Figure

        from attnmarkov import plot

        figure = Figure(figsize=(10, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot.coverage_threshold(dataset, ax=left)
        plot.lost_contrasts(dataset, ax=right)
        figure.set_label(
            "Left: mean excess risk on prompts of all tokens against the number of prompts; it "
            "falls as 1/n with a bridge between the first and the last token, on dashed predicted "
            "lines, and stays at a floor without one. Right: squared error of every row under "
            "random supports against what its graph predicts; connected rows lie near 0, split "
            "rows on the diagonal."
        )
        return {"coverage-threshold": figure}


@partial(jax.jit, static_argnums=(2, 3))
def _random_supports(seed: jax.Array, replicates: jax.Array, number: int, size: int) -> jax.Array:
    """(R, number, K) bool: supports of two to K − 1 random tokens."""

    def one(replicate: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(seed, 1), replicate)
        many, order = jax.random.split(key)
        rank = jnp.argsort(jax.random.uniform(order, (number, size)), axis=1)
        return rank < jax.random.randint(many, (number, 1), 2, size)

    return jax.vmap(one)(replicates)


@partial(jax.jit, static_argnames=("num_prompts", "length", "num_test_prompts"))
def _replicates(
    key: jax.Array,
    seed: jax.Array,
    replicates: jax.Array,
    teacher_of: jax.Array,
    supports: jax.Array,
    probs: jax.Array,
    concentration: float,
    *,
    num_prompts: int,
    length: int,
    num_test_prompts: int,
) -> dict[str, jax.Array]:
    size = supports.shape[-1]

    def one(replicate: jax.Array, teacher_id: jax.Array, held: jax.Array) -> dict[str, jax.Array]:
        draw = jax.random.fold_in(key, replicate)
        pick, token, label, test = jax.random.split(draw, 4)
        teacher_key = jax.random.fold_in(jax.random.fold_in(seed, 0), teacher_id)
        teacher = CCMC.from_transition_matrix(
            random_transition_matrix(teacher_key, size, concentration)
        )
        chosen = jax.random.choice(pick, probs.shape[0], (num_prompts,), p=probs)
        number = held.sum(-1)[chosen][:, None]
        place = jax.random.randint(token, (num_prompts, length), 0, number)
        tokens = jnp.argsort(~held, axis=-1, stable=True)[chosen[:, None], place]
        train = Prompts.from_tokens(tokens, size)
        student = fit(train, teacher.sample(label, train))
        fresh = uniform_prompts(test, num_test_prompts, length, size)

        projector = component_projector(student.components).astype(float)
        elimination = eliminate(num_prompts * fisher_information(teacher, train))
        limit = teacher.logits - jnp.einsum("kab,kb->ka", projector, teacher.logits)
        wrong = student.model.logits - teacher.logits
        within = student.model.logits - limit
        test_information = fisher_information(teacher, fresh)
        return {
            "squared_error": (wrong**2).sum(-1),
            "identified_error": (within**2).sum(-1),
            "predicted_error": pseudo_inverse_diagonal(elimination, student.components).sum(-1),
            "lost": ((teacher.logits - limit) ** 2).sum(-1),
            "excess_risk": excess_risk(teacher, student.model, fresh),
            "predicted_risk": trace_against(elimination, student.components, test_information) / 2,
            "floor": excess_risk(teacher, CCMC(limit), fresh),
            "connected": (student.components == 0).all(-1),
            "num_identifiable": student.num_parameters,
            "status": student.status.code,
        }

    return jax.vmap(one)(replicates, teacher_of, supports)
