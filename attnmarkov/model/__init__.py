"""The CCMC, self-attention and the exact maps between them; contexts and decoders."""

from attnmarkov.model.attention import SelfAttention
from attnmarkov.model.attention_head import AttentionHead
from attnmarkov.model.ccmc import CCMC
from attnmarkov.model.contexts import (
    Context,
    DecayContext,
    FullContext,
    LagContext,
    WindowContext,
)
from attnmarkov.model.decoders import Decoder, Greedy, Sampling
from attnmarkov.model.maps import (
    attention_weight,
    centre_logits,
    logits_from_transition_matrix,
    scores,
)
from attnmarkov.model.positions import PositionContext

__all__ = [
    "CCMC",
    "AttentionHead",
    "Context",
    "DecayContext",
    "Decoder",
    "FullContext",
    "Greedy",
    "LagContext",
    "PositionContext",
    "Sampling",
    "SelfAttention",
    "WindowContext",
    "attention_weight",
    "centre_logits",
    "logits_from_transition_matrix",
    "scores",
]
