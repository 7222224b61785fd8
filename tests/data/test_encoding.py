import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers, processors

from horizon.data.documents import Document
from horizon.data.encoding import encode
from horizon.data.tokenizer import byte_tokenizer, train_tokenizer


def documents(*texts):
    return [Document(f"f{n}", text) for n, text in enumerate(texts)]


def test_each_text_ends_with_the_end_of_text(small_tokenizer):
    tokens = encode(small_tokenizer, documents("def add", "left"))
    eos = small_tokenizer.eos_token_id
    expected = [[*small_tokenizer(text)["input_ids"], eos] for text in ("def add", "left")]
    assert tokens.ids.tolist() == expected[0] + expected[1]
    assert tokens.lengths.tolist() == [len(part) for part in expected]
    assert tokens.starts.tolist() == [0, len(expected[0])]
    assert tokens.trained.all() and tokens.ids.dtype == np.int32


def test_a_token_that_the_tokenizer_puts_in_front_stays_even_when_it_is_the_end_of_text():
    tokenizer = byte_tokenizer()
    eos = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", eos)]
    )
    assert encode(tokenizer, documents("a")).ids.tolist() == [eos, *tokenizer("a")["input_ids"][1:], eos]


def test_a_tokenizer_without_an_end_adds_none():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert len(encode(tokenizer, documents("abc")).ids) == 3


@pytest.mark.parametrize("batch_chars", [1, 7, 1000])
@pytest.mark.parametrize("piece_chars", [3, 1000])
def test_neither_batches_nor_pieces_lose_or_reorder_text(monkeypatch, batch_chars, piece_chars):
    texts = ["one\ntwo\nthree", "a", "no line end in this long text", "é😀\n" * 5]
    whole = encode(byte_tokenizer(), documents(*texts))
    monkeypatch.setattr("horizon.data.encoding._BATCH_CHARS", batch_chars)
    monkeypatch.setattr("horizon.data.encoding._PIECE_CHARS", piece_chars)
    monkeypatch.setattr("horizon.data.encoding._UNCUT_CHARS", piece_chars)
    parts = encode(byte_tokenizer(), documents(*texts))
    assert parts.ids.tolist() == whole.ids.tolist()
    assert parts.lengths.tolist() == whole.lengths.tolist() == [len(text.encode()) + 1 for text in texts]


def test_tokens_that_begin_in_a_span_are_trained():
    text = "abc def ghi"
    tokens = encode(byte_tokenizer(), [Document("f", text, ((1, 3), (3, 5), (9, 11)))])
    assert [text[n] for n in np.flatnonzero(tokens.trained)] == ["b", "c", " ", "d", "h", "i"]
    assert len(tokens.ids) == len(text)


def test_long_texts_are_cut_where_no_token_changes(monkeypatch):
    text = "def add(left): 12345 don't\n\n    return left\n\n\nleft\n" * 9 + "return " * 40
    tokenizer = train_tokenizer([text * 20], vocab_size=300, seed=0)  # with tokens of several line ends
    whole = encode(tokenizer, documents(text))
    for size in range(40, 70):
        monkeypatch.setattr("horizon.data.encoding._PIECE_CHARS", size)
        assert encode(tokenizer, documents(text)).ids.tolist() == whole.ids.tolist()


def test_a_tokenizer_that_reads_cut_text_otherwise_is_given_long_pieces(monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
    monkeypatch.setattr("horizon.data.encoding._PIECE_CHARS", 4)
    assert tokenizer.decode(encode(tokenizer, documents("one\ntwo\nsix\n")).ids) == "_one\ntwo\nsix\n<|endoftext|>"


def test_a_lone_document_is_cut_by_tokens():
    tokens = encode(byte_tokenizer(), documents("0123456789"))
    cut = tokens.cut(0.3)
    assert cut.lengths.tolist() == [8, 3] and cut.where == ["f0", "f0 (tail)"]
    assert cut.ids.tolist() == tokens.ids.tolist()
    assert tokens.cut(0.1).lengths.tolist() == [11]  # one token would have nothing before it


@given(data=st.data())
def test_trained_tokens_are_those_whose_first_character_is_in_a_span(small_tokenizer, data):
    text = data.draw(st.text("ab é\n😀del", min_size=1, max_size=30))
    edges = data.draw(st.lists(st.integers(0, len(text)), max_size=6, unique=True).map(sorted))
    spans = tuple(zip(edges[::2], edges[1::2], strict=False))
    offsets = small_tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    expected = [any(start <= begin < end for start, end in spans) for begin, _ in offsets]
    assert encode(small_tokenizer, [Document("f", text, spans)]).trained.tolist() == expected


def test_a_token_that_begins_before_a_span_is_not_of_it(small_tokenizer):
    offsets = small_tokenizer("left left", return_offsets_mapping=True)["offset_mapping"]
    first = offsets[0][1] - 1
    assert first > offsets[0][0]  # in the middle of the first token
    tokens = encode(small_tokenizer, [Document("f", "left left", ((first, 9),))])
    assert tokens.trained.tolist() == [False] + [True] * (len(offsets) - 1)
