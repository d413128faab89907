"""Torch and transformers, loaded when they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def libraries() -> tuple[Any, Any]:
    """The modules ``torch`` and ``transformers``.

    Raises:
        ImportError: If one is not installed, saying how to.
    """
    try:
        # Of the extra hf: where it is not installed, the type checker knows neither.
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "models of Hugging Face need torch and transformers: pip install 'attnmarkov[hf]'"
        ) from error
    return torch, transformers


def to_numpy(tensor: Any) -> np.ndarray:
    """A float32 copy on the host."""
    return tensor.detach().float().cpu().numpy()
