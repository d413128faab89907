"""One attention head of a Hugging Face model, as the matrices of a CCMC."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attnmarkov import _validate
from attnmarkov.adapters._torch import libraries, to_numpy

if TYPE_CHECKING:
    from jaxtyping import Float


class HeadWeights(NamedTuple):
    """The arguments of :meth:`attnmarkov.CCMC.from_attention_head` for one head of a model.

    Attributes:
        embedding: (K, d) ``E``, with a last column of ones where there are biases.
        query_weight: (d, r) ``W_Q``, with the bias as its last row.
        key_weight: (d, r) ``W_K``, likewise.
        scale: Factor of the scores.
    """

    embedding: Float[np.ndarray, "token d"]
    query_weight: Float[np.ndarray, "d r"]
    key_weight: Float[np.ndarray, "d r"]
    scale: float


def head_weights(model: Any, layer: int, head: int, *, layer_norm: bool = True) -> HeadWeights:
    """Embedding, query and key matrix of one attention head, without positions.

    ``CCMC.from_attention_head(*head_weights(model, layer, head))`` attends as the head would if
    token embeddings alone came in. In the first layer that neglects nothing but positions
    (GPT-2's position embeddings, rotations of Llama and its kin): the layer norm and biases are
    there. In a later layer it also neglects all that the layers below add to the embeddings.

    Args:
        model: GPT-2 of ``transformers``, or a model with ``q_proj`` and ``k_proj`` such as Llama,
            Mistral or Qwen2; keys shared by groups of heads are known.
        layer: Layer, from 0.
        head: Head, from 0.
        layer_norm: Apply the layer's own normalisation to the embeddings, as the model does;
            without it they are taken raw.

    Raises:
        ImportError: Without ``transformers`` and ``torch``.
        TypeError: If the architecture is another one.
        ValueError: If there is no such layer or head.
    """
    torch, _ = libraries()
    block, attention = _attention(model, layer, torch)
    head = _validate.integer(head, "head", minimum=0)
    number = model.config.num_attention_heads
    if head >= number:
        raise ValueError(f"head: {head} is outside 0..{number - 1}")
    with torch.no_grad():
        e = model.get_input_embeddings().weight
        width = e.shape[1]
        if hasattr(attention, "c_attn"):
            norm, fused = block.ln_1, attention.c_attn
            weights, biases = fused.weight.split(width, dim=1)[:2], fused.bias.split(width)[:2]
        else:
            norm, pair = block.input_layernorm, (attention.q_proj, attention.k_proj)
            weights, biases = [p.weight.T for p in pair], [p.bias for p in pair]
        rank = weights[0].shape[1] // number
        num_keys = weights[1].shape[1] // rank
        cuts = [slice(i * rank, (i + 1) * rank) for i in (head, head * num_keys // number)]
        q, k = (to_numpy(w[:, cut]) for w, cut in zip(weights, cuts, strict=True))
        e = to_numpy(norm(e) if layer_norm else e)
        if biases[0] is not None:
            b_q, b_k = (to_numpy(b[cut]) for b, cut in zip(biases, cuts, strict=True))
            e = np.column_stack([e, np.ones(len(e), e.dtype)])
            q, k = np.vstack([q, b_q]), np.vstack([k, b_k])
    return HeadWeights(e, q, k, float(attention.scaling))


def _attention(model: Any, layer: int, torch: Any) -> tuple[Any, Any]:
    """A layer and its attention, of a known kind."""
    layer = _validate.integer(layer, "layer", minimum=0)
    base = getattr(model, "base_model", None)
    blocks: Any = getattr(base, "h", getattr(base, "layers", None))
    if isinstance(blocks, torch.nn.ModuleList):
        if layer >= len(blocks):
            raise ValueError(f"layer: {layer} is outside 0..{len(blocks) - 1}")
        block = blocks[layer]
        attention = getattr(block, "attn", getattr(block, "self_attn", None))
        separate = all(hasattr(attention, x) for x in ("q_proj", "k_proj"))
        if (separate or hasattr(attention, "c_attn")) and not hasattr(attention, "q_norm"):
            return block, attention
    raise TypeError(
        f"model: {type(model).__name__} is not of a known kind; layers need attn.c_attn (GPT-2), "
        "or self_attn.q_proj and self_attn.k_proj (Llama) without q_norm"
    )
