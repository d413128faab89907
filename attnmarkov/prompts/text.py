"""Token ids from text, and windows of a text as prompts with the token after each."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnmarkov import _validate
from attnmarkov.prompts.batch import Prompts

if TYPE_CHECKING:
    from os import PathLike

    from jaxtyping import Int

LEVELS = ("char", "word")

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[^\w\s]|_")
"""A word (letters and digits, with apostrophes and hyphens inside) or one punctuation mark."""

UNKNOWN = {"char": "\N{REPLACEMENT CHARACTER}", "word": "<unk>"}
"""How a token outside the vocabulary is written, per level."""


def read_text(path: str | PathLike[str]) -> str:
    """Read a UTF-8 text file; line ends become LF, a byte order mark is dropped.

    Raises:
        ValueError: If the file is missing, is a directory, can't be read, holds nothing but
            whitespace, or is not UTF-8 (the byte offset of the first bad byte is named).
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"file: {path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"file: {path} is a directory, not a text file") from None
    except OSError as error:
        raise ValueError(f"file: {path} can't be read ({error.strerror})") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"file: {path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
        ) from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ValueError(
            f"file: {path} is empty" if not text else f"file: {path} is all whitespace"
        )
    return text


def tokenize(text: str, level: str = "char", *, fold_case: bool = False) -> list[str]:
    """Cut a text into tokens.

    Args:
        text: Any string.
        level: ``"char"``, every character a token; or ``"word"``, lower-cased words (letters and
            digits, with apostrophes and hyphens inside) and single punctuation marks, as matched
            by :data:`WORD`; whitespace separates and is dropped.
        fold_case: Lower the case at character level too.

    Raises:
        ValueError: If ``level`` is unknown.

    >>> tokenize("Don't panic--she said.", "word")
    ["don't", 'panic', '-', '-', 'she', 'said', '.']
    >>> tokenize("Oh!")
    ['O', 'h', '!']
    """
    _validate.choice(level, "level", LEVELS)
    if level == "word":
        return WORD.findall(text.lower())
    return list(text.lower() if fold_case else text)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that ids stand for; build one with :meth:`from_text`.

    Attributes:
        tokens: The K tokens; ``tokens[i]`` has id ``i``.
        level: ``"char"`` or ``"word"``.
        unknown: Id that stands for every token not in the vocabulary, or None if there is none.
        fold_case: Whether case is lowered at character level (at word level it always is).
    """

    tokens: tuple[str, ...]
    level: str = "char"
    unknown: int | None = None
    fold_case: bool = False

    @classmethod
    def from_text(
        cls,
        text: str,
        level: str = "char",
        max_tokens: int | None = None,
        *,
        min_count: int = 1,
        fold_case: bool = False,
        unknown: bool = False,
    ) -> Vocabulary:
        """The vocabulary of a text, most frequent token first (ties in code point order).

        Args:
            text: The text.
            level: ``"char"`` or ``"word"``, see :func:`tokenize`.
            max_tokens: Largest vocabulary size K, the unknown token included; the rarest tokens
                become unknown. None: no limit.
            min_count: Tokens seen fewer times than this become unknown.
            fold_case: Lower the case at character level.
            unknown: Add the unknown token even if the text itself needs none.

        Raises:
            ValueError: If the text has no token, or an argument is out of range.

        >>> vocabulary = Vocabulary.from_text("abracadabra", max_tokens=4)
        >>> vocabulary
        Vocabulary(4 tokens at char level: 'a' 'b' 'r', and 1 for the unknown)
        >>> vocabulary.encode("bard").tolist()
        [1, 0, 2, 3]
        """
        found = Counter(tokenize(text, level, fold_case=fold_case))
        if not found:
            raise ValueError(f"text: holds no {level} token")
        min_count = _validate.integer(min_count, "min_count", minimum=1)
        if max_tokens is not None:
            max_tokens = _validate.integer(max_tokens, "max_tokens", minimum=1)
        kept = sorted(
            (t for t, c in found.items() if c >= min_count and t != UNKNOWN[level]),
            key=lambda t: (-found[t], t),
        )
        if unknown or len(kept) < len(found) or (max_tokens and len(kept) > max_tokens):
            if max_tokens is not None:
                kept = kept[: max_tokens - 1]
            return cls((*kept, UNKNOWN[level]), level, len(kept), fold_case)
        return cls(tuple(kept), level, None, fold_case)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @property
    def num_tokens(self) -> int:
        """Vocabulary size K, the unknown token included."""
        return len(self.tokens)

    def encode(self, text: str) -> Int[np.ndarray, " position"]:
        """Token ids of a text, as int32.

        Raises:
            ValueError: If a token is not in the vocabulary and there is no unknown token; it is
                named with its position.
        """
        tokens = tokenize(text, self.level, fold_case=self.fold_case)
        default = -1 if self.unknown is None else self.unknown
        ids = np.fromiter((self._ids.get(t, default) for t in tokens), np.int32, len(tokens))
        if self.unknown is None and (ids < 0).any():
            where = int(np.argmax(ids < 0))
            raise ValueError(
                f"text: token {tokens[where]!r} at position {where} is not in the vocabulary of "
                f"{self.num_tokens} tokens, which has no unknown token"
            )
        return ids

    def decode(self, ids: Any) -> str:
        """The text that ids stand for: characters joined as they are, words by single blanks.

        Raises:
            ValueError: If an id is not an integer in ``0..K-1``.
        """
        array = _validate.integer_array(ids, "ids", ndim=(1,))
        _validate.token_range(array, "ids", self.num_tokens)
        return ("" if self.level == "char" else " ").join(self.tokens[i] for i in array)

    def __repr__(self) -> str:
        """The size, the level and the first tokens."""
        known = [t for i, t in enumerate(self.tokens) if i != self.unknown]
        shown = " ".join(map(repr, known[:8])) + (" ..." if len(known) > 8 else "")
        tail = "" if self.unknown is None else ", and 1 for the unknown"
        return f"Vocabulary({self.num_tokens} tokens at {self.level} level: {shown}{tail})"


def windows(
    tokens: Any, length: int, num_tokens: int, stride: int = 1
) -> tuple[Prompts, Int[np.ndarray, " prompt"]]:
    """Windows of a token sequence as prompts, and the token that follows each.

    Window ``i`` holds tokens ``i*stride .. i*stride + length - 1``. Counts come from running
    differences, in O(N + nK) time and without an (n, length) copy of the text.

    Args:
        tokens: (N,) token ids.
        length: Tokens per window, at least 1.
        num_tokens: Vocabulary size K.
        stride: Distance between the starts of neighbouring windows, at least 1.

    Returns:
        ``n = 1 + (N - length - 1) // stride`` prompts, and the (n,) int32 next tokens.

    Raises:
        ValueError: If a number is below 1, an id is not in ``0..K-1``, or the sequence is
            shorter than one window and its next token.

    >>> prompts, following = windows([0, 1, 1, 2, 0], length=3, num_tokens=3)
    >>> prompts.counts.tolist(), prompts.last.tolist(), following.tolist()
    ([[1, 2, 0], [0, 2, 1]], [1, 2], [2, 0])
    """
    length = _validate.integer(length, "length", minimum=1)
    num_tokens = _validate.integer(num_tokens, "num_tokens", minimum=1)
    stride = _validate.integer(stride, "stride", minimum=1)
    ids = _validate.integer_array(tokens, "tokens", ndim=(1,))
    _validate.token_range(ids, "tokens", num_tokens)
    if len(ids) <= length:
        raise ValueError(
            f"tokens: {len(ids)} tokens are too few for one window of {length} and its next token"
        )
    number = 1 + (len(ids) - length - 1) // stride
    position = np.arange(len(ids))
    enters = np.maximum(-((length - 1 - position) // stride), 0)  # ceil((p - length + 1)/stride)
    leaves = position // stride + 1
    counts = np.zeros((number, num_tokens), np.int32)
    for rows, sign in ((enters, 1), (leaves, -1)):
        valid = rows < number
        np.add.at(counts, (rows[valid], ids[valid]), sign)
    np.cumsum(counts, axis=0, out=counts)
    ends = np.arange(number) * stride + length
    return Prompts.from_counts(counts, ids[ends - 1]), ids[ends].astype(np.int32)
