"""Checks and print-outs of the numbers that contexts and decoders carry as pytree leaves."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from attnmarkov import _validate

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def number(value: Any, name: str) -> float | None:
    """``value`` as a float, None if it is traced; raises unless it is a single real number."""
    if not _validate.is_concrete(value):
        return None
    try:
        if isinstance(value, str | bool) or np.ndim(value) != 0:
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number, got {value!r:.80}") from None


def positive(value: Any, name: str) -> None:
    """Raise unless ``value`` is a finite number above zero (or traced)."""
    x = number(value, name)
    if x is not None and not 0 < x < np.inf:
        raise ValueError(f"{name}: must be positive and finite, got {x:g}")


def fraction(value: Any, name: str) -> None:
    """Raise unless ``value`` is a number in (0, 1] (or traced)."""
    x = number(value, name)
    if x is not None and not 0 < x <= 1:
        raise ValueError(f"{name}: must lie in (0, 1], got {x:g}")


def show(obj: Any) -> str:
    """``Class(field=value, ...)`` on one line: arrays by shape, defaults left out."""
    shown = []
    for field in sorted(dataclasses.fields(obj), key=lambda field: bool(field.kw_only)):
        value = getattr(obj, field.name)
        if hasattr(value, "shape") and (value.shape or not _validate.is_concrete(value)):
            text = f"{value.dtype}[{','.join(map(str, value.shape))}]"
        elif value is None or isinstance(value, int | float) or hasattr(value, "shape"):
            if value is None or value == field.default:
                continue
            text = str(np.asarray(value)[()])
        else:
            text = f"{value}"
        shown.append(f"{field.name}={text}")
    return f"{type(obj).__name__}({', '.join(shown)})"


def finite(array: ArrayLike, name: str, *, allow_minus_inf: bool = False) -> ArrayLike:
    """The array in float64 after a look at its values; as it is if they are traced."""
    if not _validate.is_concrete(array):
        return array
    return _validate.finite(array, name, allow_minus_inf=allow_minus_inf)
