"""Text comes out as it comes in, whole characters at a time."""

import pytest

from titans.data import ByteTokenizer
from titans.data.text_stream import TextStream

TEXT = "naïve 記憶 🧠 end"


def test_bytes_never_show_half_a_character():
    stream = TextStream(ByteTokenizer(), is_bytes=True)
    pieces = [stream.push(byte) for byte in TEXT.encode()]
    assert "".join(pieces) + stream.finish() == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert [len(piece) for piece in pieces].count(1) == len(TEXT)


@pytest.mark.parametrize("is_bytes", [True, False])
def test_what_is_no_character_is_shown_as_such_and_does_not_block(is_bytes):
    stream = TextStream(ByteTokenizer(), is_bytes)
    shown = "".join(stream.push(byte) for byte in [0xFF] * 20 + list(b"ok"))
    assert shown.endswith("ok")
    assert set(shown) == {"\ufffd", "o", "k"}
    stream.push(0xE8)
    assert stream.finish() == "\ufffd"


def test_other_tokenizers_decode_in_context():
    class Words:
        """Joins with spaces, none at the start, as word-piece decoders do; id 3 and 4 are halves of one character."""

        def decode(self, ids):
            words = [("a", "b", "c")[i] for i in ids if i < 3]
            tail = {(3,): " \ufffd", (3, 4): " é"}.get(tuple(i for i in ids if i >= 3), "")
            return " ".join(words) + tail

    stream = TextStream(Words(), is_bytes=False)
    assert [stream.push(i) for i in (0, 1, 2, 3, 4)] == ["a", " b", " c", "", " é"]
    assert stream.finish() == ""


def test_ids_that_are_no_bytes_are_shown_as_such():
    text = TextStream(ByteTokenizer(), True)
    assert text.push(ord("a")) + text.push(300) + text.push(ord("b")) + text.finish() == "a\ufffdb"


def test_ids_that_no_tokenizer_knows_are_shown_as_such():
    """A model may have more ids than its tokenizer, whose vocabulary was rounded up."""

    class Letters:
        vocab_size = 26

        def decode(self, ids):
            assert all(i < 26 for i in ids)
            return "".join(chr(97 + i) for i in ids)

    stream = TextStream(Letters(), is_bytes=False)
    assert [stream.push(i) for i in (7, 26, 8, 99, 99)] == ["h", "\ufffd", "i", "\ufffd", "\ufffd"]
    assert stream.finish() == ""
