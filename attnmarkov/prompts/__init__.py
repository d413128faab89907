"""Prompts: batches of contexts, distributions to draw them from, and token ids from text."""

from attnmarkov.prompts.batch import Prompts
from attnmarkov.prompts.distributions import (
    every_token_once,
    from_supports,
    iid,
    markov,
    uniform,
    without_replacement,
)
from attnmarkov.prompts.text import Vocabulary, read_text, tokenize, windows

__all__ = [
    "Prompts",
    "Vocabulary",
    "every_token_once",
    "from_supports",
    "iid",
    "markov",
    "read_text",
    "tokenize",
    "uniform",
    "windows",
    "without_replacement",
]
