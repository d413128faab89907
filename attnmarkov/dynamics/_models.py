"""The model that dynamics is asked about, as a CCMC."""

from __future__ import annotations

from attnmarkov.model import CCMC, AttentionHead, SelfAttention


def as_ccmc(model: CCMC | SelfAttention | AttentionHead) -> CCMC:
    """The CCMC itself, or that of self-attention or of an attention head.

    Raises:
        ValueError: If it is none of these, or the logits of a head would be too large.
    """
    if isinstance(model, SelfAttention | AttentionHead):
        return model.to_ccmc()
    if not isinstance(model, CCMC):
        raise ValueError(f"model: expected a CCMC or a SelfAttention, got {type(model).__name__}")
    return model
