"""The example text that comes with the package (public domain; see README.md beside it)."""

from __future__ import annotations

from pathlib import Path

__all__ = ["alice_path", "example_text"]


def alice_path() -> Path:
    """Path of *Alice's Adventures in Wonderland* (Lewis Carroll, 1865), plain ASCII.

    >>> alice_path().name
    'alice.txt'
    """
    return Path(__file__).with_name("alice.txt")


def example_text() -> str:
    """The text of *Alice's Adventures in Wonderland*.

    >>> example_text().split()[:4]
    ["ALICE'S", 'ADVENTURES', 'IN', 'WONDERLAND']
    """
    return alice_path().read_text(encoding="ascii")
