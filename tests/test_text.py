"""Token ids from text, and windows of a text as prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import attnmarkov as am
from attnmarkov import data
from attnmarkov.prompts.text import UNKNOWN, Vocabulary, read_text, tokenize, windows

SENTENCE = "Oh dear! Oh dear! I shan't be late--not I, said the White-Rabbit."


def test_words_and_marks_are_cut_as_documented():
    assert tokenize("Don't stop, White-Rabbit! _I_ 42--x", "word") == (
        ["don't", "stop", ",", "white-rabbit", "!", "_", "i", "_", "42", "-", "-", "x"]
    )
    assert tokenize("Été—naïve\n’tis", "word") == ["été", "—", "naïve", "’", "tis"]
    assert tokenize("Ab\n") == ["A", "b", "\n"]
    assert tokenize("Ab\n", fold_case=True) == ["a", "b", "\n"]


@given(st.text(min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_characters_survive_the_round_trip(text):
    vocabulary = Vocabulary.from_text(text)
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32
    assert vocabulary.decode(ids) == text


def test_words_survive_the_round_trip_up_to_blanks():
    vocabulary = Vocabulary.from_text(SENTENCE, "word")
    assert vocabulary.unknown is None
    ids = vocabulary.encode(SENTENCE)
    assert vocabulary.decode(ids).split(" ") == tokenize(SENTENCE, "word")


def test_vocabulary_is_kept_in_order_of_frequency():
    vocabulary = Vocabulary.from_text("banana")
    assert vocabulary.tokens == ("a", "n", "b")
    assert vocabulary.num_tokens == 3
    assert Vocabulary.from_text("ba").tokens == ("a", "b")  # ties in code point order


@pytest.mark.parametrize("level", ["char", "word"])
def test_rarest_tokens_become_unknown(level):
    text = "b b b a a c d e"
    vocabulary = Vocabulary.from_text(text.replace(" ", "") if level == "char" else text, level, 3)
    assert vocabulary.tokens == ("b", "a", UNKNOWN[level])
    assert vocabulary.unknown == 2
    assert vocabulary.encode("a d z" if level == "word" else "adz").tolist() == [1, 2, 2]


def test_no_token_is_mapped_when_the_vocabulary_just_fits():
    assert Vocabulary.from_text("aab", max_tokens=2).tokens == ("a", "b")
    assert Vocabulary.from_text("aabc", max_tokens=2).tokens == ("a", UNKNOWN["char"])
    assert Vocabulary.from_text("aab", min_count=2).tokens == ("a", UNKNOWN["char"])
    assert Vocabulary.from_text("aab", unknown=True).tokens == ("a", "b", UNKNOWN["char"])


def test_the_unknown_mark_in_a_text_is_the_unknown_token():
    vocabulary = Vocabulary.from_text("a" + UNKNOWN["char"])
    assert vocabulary.tokens == ("a", UNKNOWN["char"])
    assert vocabulary.encode("b").tolist() == [vocabulary.unknown]


def test_a_token_outside_the_vocabulary_is_named():
    vocabulary = Vocabulary.from_text("ab")
    with pytest.raises(ValueError, match=r"text: token 'z' at position 1 .* no unknown token"):
        vocabulary.encode("az")


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: tokenize("a", "line"), "level: unknown level 'line'; known: char, word"),
        (lambda: Vocabulary.from_text(""), "text: holds no char token"),
        (lambda: Vocabulary.from_text("  ", "word"), "text: holds no word token"),
        (lambda: Vocabulary.from_text("a", max_tokens=0), "max_tokens: must be at least 1, got 0"),
        (lambda: Vocabulary.from_text("a", min_count=0), "min_count: must be at least 1, got 0"),
        (lambda: Vocabulary.from_text("a").decode([1]), r"ids: entry \[0\] is token id 1"),
        (lambda: Vocabulary.from_text("a").decode([-1]), r"ids: entry \[0\] is token id -1"),
        (lambda: windows([0, 1], 2, 2), "tokens: 2 tokens are too few for one window of 2"),
        (lambda: windows([0, 1], 0, 2), "length: must be at least 1, got 0"),
        (lambda: windows([0, 1], 1.5, 2), "length: expected an integer, got 1.5"),  # type: ignore[arg-type]
        (lambda: windows([0, 1], 1, 2, stride=0), "stride: must be at least 1, got 0"),
        (lambda: windows([0, 2], 1, 2), r"tokens: entry \[1\] is token id 2, outside 0\.\.1"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@given(
    st.integers(2, 60),
    st.integers(1, 20),
    st.integers(1, 25),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_windows_agree_with_a_plain_loop(number, length, stride, size, seed):
    if number <= length:
        number = length + 1
    tokens = np.random.default_rng(seed).integers(0, size, number)
    prompts, following = windows(tokens, length, size, stride)
    starts = range(0, number - length, stride)
    assert len(prompts) == len(starts)
    assert following.dtype == np.int32
    for i, start in enumerate(starts):
        window = tokens[start : start + length]
        np.testing.assert_array_equal(prompts.counts[i], np.bincount(window, minlength=size))
        assert prompts.last[i] == window[-1]
        assert following[i] == tokens[start + length]


def test_windows_agree_with_prompts_from_tokens():
    tokens = Vocabulary.from_text(SENTENCE).encode(SENTENCE)
    size = int(tokens.max()) + 1
    prompts, following = windows(tokens, 7, size)
    rows = np.lib.stride_tricks.sliding_window_view(tokens, 7)[:-1]
    expected = am.Prompts.from_tokens(rows, size)
    np.testing.assert_array_equal(prompts.counts, expected.counts)
    np.testing.assert_array_equal(prompts.last, expected.last)
    np.testing.assert_array_equal(following, tokens[7:])
    assert prompts.counts.dtype == np.int32


def test_read_text_normalises_line_ends_and_drops_the_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé\r\nb\rc\n".encode())
    assert read_text(path) == "é\nb\nc\n"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "does not exist"),
        ("directory", "is a directory"),
        (b"", "is empty"),
        (b" \n\t", "is all whitespace"),
        (b"abc\xffdef", "is not UTF-8: byte 0xff at offset 3"),
        (b"\xef\xbb\xbfab\xe9", "is not UTF-8: byte 0xe9 at offset 5"),
    ],
)
def test_files_that_are_no_text_are_named(tmp_path, content, match):
    path = tmp_path / "some.txt"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"file: .*some\.txt {match}"):
        read_text(path)


def test_the_shipped_text_is_the_author_s():
    text = data.example_text()
    assert text == read_text(data.alice_path())
    assert text.isascii()
    assert not {c for c in text if not c.isprintable()} - {"\n"}
    assert text.split()[:6] == ["ALICE'S", "ADVENTURES", "IN", "WONDERLAND", "Lewis", "Carroll"]
    assert text.rstrip().endswith("THE END")
    for foreign in ("edition", "FULCRUM", "["):
        assert foreign not in text
