"""What decoding remedies are held against: entropies and costs, measured beside predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnmarkov.experiments._statistics import INTERVAL_99_99
from attnmarkov.sweep import Claim

if TYPE_CHECKING:
    import xarray as xr

NAME = "decoding-remedies"
SOURCE = "Mean field of reinforced walks with powers (Pemantle 1992, Benaïm 1997, Volkov 2006)"
ALPHA = 1e-4  # how often an interval may miss
_NEAR = 0.05  # the most that a finite time may add to what is judged
_SLOW = 0.3  # relaxation rates below this leave too much of the beginning


def limit_claim(flat: xr.Dataset, key: str) -> Claim:
    """Mean entropy or cost at the equilibrium, within the finite-time allowance."""
    from scipy import stats

    judged = flat["rate"].values >= _SLOW
    shown = flat.isel(setting=judged if judged.any() else slice(None))
    allowance = shown[f"{key}_allowance"].values
    half = stats.norm.isf(ALPHA / 2 / len(allowance)) * shown[f"{key}_error"].values
    off = abs(shown[key] - shown[f"{key}_predicted"]).values
    worst = int((off - half - allowance).argmax())
    verdict = "fail" if (off > half + allowance).any() else "pass"
    unsure = verdict == "pass" and max(allowance.max(), half.max()) > _NEAR
    if not judged.any() or shown["trajectories"].values.min() < 40 or unsure:
        verdict = "inconclusive"
    at = shown.isel(setting=worst)
    claim = (
        f"a < 1: mean {key} of the last decade (nats per token) at {at['setting'].values}, "
        f"where all tokens keep a share; the worst of {len(allowance)} settings (finite-time "
        f"allowance ± {allowance[worst]:.3f}; {int((~judged).sum())} relax too slowly to be "
        "judged)"
    )
    predicted, measured = float(at[f"{key}_predicted"]), float(at[key])
    return Claim(NAME, claim, SOURCE, predicted, measured, float(half[worst]), verdict)


def falling_claim(table: xr.Dataset) -> Claim:
    """Where generation collapses the cost falls from decade to decade."""
    half = INTERVAL_99_99 * table["gain_error"].values
    gain = table["gain"].values
    worst = int((gain + half).argmax())
    verdict = "pass" if (gain + half < 0).all() else "inconclusive"
    if (gain - half > 0).any():
        verdict = "fail"
    claim = (
        "where generation collapses (plain, a > 1, top-k, top-p, window, decay), the cost "
        "falls: change of nats per token from the decade before to the last, at "
        f"{table['setting'].values[worst]}, the worst of {len(gain)} settings"
    )
    measured, uncertainty = float(gain[worst]), float(half[worst])
    return Claim(NAME, claim, SOURCE, "below 0", measured, uncertainty, verdict)


def own_claim(plain: xr.Dataset) -> Claim:
    """Plain tokens are as likely as the model's law says they are: a martingale."""
    half = INTERVAL_99_99 * float(plain["excess_error"])
    excess = float(plain["excess"])
    verdict = "fail" if abs(excess) > half else "pass" if half < 0.01 else "inconclusive"
    claim = "plain sampling: cost less the model's own entropy (nats per token)"
    return Claim(NAME, claim, "Definition of the cost", 0.0, excess, half, verdict)


def remedy_claim(flat: xr.Dataset, plain: xr.Dataset) -> Claim:
    """Every power below 1 keeps more entropy than plain sampling."""
    more = flat["entropy"].values - float(plain["entropy"])
    half = INTERVAL_99_99 * np.hypot(flat["entropy_error"].values, float(plain["entropy_error"]))
    worst = int((more - half).argmin())
    verdict = "pass" if (more > half).all() else "inconclusive"
    if (more < -half).any():
        verdict = "fail"
    at = flat.isel(setting=worst)
    claim = (
        f"a < 1: entropy that {at['setting'].values} keeps beyond plain sampling in the last "
        f"decade, the least of {len(more)} settings, at a cost of {float(at['cost']):.3f} "
        f"nats per token (plain: {float(plain['cost']):.3f})"
    )
    uncertainty = float(half[worst])
    return Claim(NAME, claim, SOURCE, "above 0", float(more[worst]), uncertainty, verdict)


def cheaper_claim(table: xr.Dataset, exponents: tuple[float, ...]) -> list[Claim]:
    """A reinforcement exponent costs less than the temperature with the same power."""
    out = []
    for a in exponents:
        names = f"α = {a:g}", f"T = {1 / a:g}"
        if a > 1 or not set(names) <= set(table["setting"].values.tolist()):
            continue
        context, heat = (table.sel(setting=n) for n in names)
        saved = float(heat["cost"] - context["cost"])
        predicted = float(heat["cost_predicted"] - context["cost_predicted"])
        half = INTERVAL_99_99 * float(np.hypot(heat["cost_error"], context["cost_error"]))
        allowance = float(heat["cost_allowance"] + context["cost_allowance"])
        verdict = "pass" if max(half, allowance) <= _NEAR else "inconclusive"
        if abs(saved - predicted) > half + allowance:
            verdict = "fail"
        claim = (
            f"cost that {names[0]} saves against {names[1]}, with the same power of the shares "
            f"(nats per token; finite-time allowance ± {allowance:.3f})"
        )
        out.append(Claim(NAME, claim, SOURCE, predicted, saved, half, verdict))
    return out
