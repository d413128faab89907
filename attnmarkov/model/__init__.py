"""The context-conditioned Markov chain, self-attention, and the exact maps between them."""

from attnmarkov.model.attention import SelfAttention
from attnmarkov.model.ccmc import CCMC
from attnmarkov.model.maps import (
    attention_weight,
    centre_logits,
    logits_from_transition_matrix,
    scores,
)

__all__ = [
    "CCMC",
    "SelfAttention",
    "attention_weight",
    "centre_logits",
    "logits_from_transition_matrix",
    "scores",
]
