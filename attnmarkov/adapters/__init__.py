"""Models of other libraries: what they generate, and their attention heads as CCMCs.

``transformers`` and ``torch`` are imported when they are used: ``pip install 'attnmarkov[hf]'``.
"""

from attnmarkov.adapters.heads import HeadWeights, head_weights
from attnmarkov.adapters.huggingface import Generation, generate

__all__ = ["Generation", "HeadWeights", "generate", "head_weights"]
