"""A text's pieces, each from one control token on, have the ids of the whole text; a conversation's texts are encoded once."""

import itertools

import pytest
from chats import FAMILIES, tokenizer_folders
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import byte_alphabet
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pshare_jax.text import control_tokens
from pshare_jax.text.control_tokens import ControlFinder, PieceEncoder, finding
from pshare_jax.text.native import encode_ids
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.data.records import RecordReader
from pshare_jax.training.data.samples import Limits

pytestmark = pytest.mark.host
# Of different lengths, one the start of another, some that join the text beside them or that normalising changes.
TOKENS = ("<a>", "<a>b>", "<<", "é>", " <s", "word", "<w>", "\n\n")
PARTS = ("<a>", "b>", "<", "é", "e\u0301", ">", " ", "  ", "s", "word", "<w>", "\n", "x", "日本", "12", "'s")
FLAGS = ("normalized", "single_word", "lstrip", "rstrip", "special")

NORMALIZERS = (None, normalizers.NFKC(), normalizers.Prepend("x"), normalizers.Replace(" ", "x"))
SPLITS = (
    pre_tokenizers.ByteLevel(add_prefix_space=True),
    pre_tokenizers.ByteLevel(add_prefix_space=False),
    pre_tokenizers.Sequence([pre_tokenizers.Metaspace("x", "first"), pre_tokenizers.ByteLevel(False)]),
)


def byte_level(added: list[AddedToken], normalizer, pre_tokenizer) -> Backend:
    vocab = {char: byte for byte, char in byte_alphabet().items()}
    backend = Backend(models.BPE(vocab=vocab | {"ab": 256, "Ġ<": 257}, merges=[("a", "b"), ("Ġ", "<")]))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer  # type: ignore[assignment]
    for token in added:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return backend


def backends() -> st.SearchStrategy[Backend]:
    token = st.builds(
        lambda text, flags: AddedToken(text, **{name: name in flags for name in FLAGS}),
        st.sampled_from(TOKENS),
        st.sets(st.sampled_from(FLAGS)),
    )
    tokens = st.lists(token, max_size=5, unique_by=lambda t: t.content)
    return st.builds(byte_level, tokens, st.sampled_from(NORMALIZERS), st.sampled_from(SPLITS))


def whole(backend: Backend, text: str) -> list[int]:
    """The library's own ids; it fails on some texts with tokens that are normalised."""
    try:
        return encode_ids(backend, text)
    except BaseException as error:
        assume(type(error).__name__ != "PanicException")
        raise


@given(backends(), st.lists(st.lists(st.sampled_from(PARTS), max_size=14).map("".join), min_size=1, max_size=4))
@settings(deadline=None, max_examples=400)
def test_pieces_have_the_ids_of_the_whole_text(backend, texts):
    encoder = PieceEncoder(backend, ControlFinder(finding(backend)), keep=1200)
    # Each text also goes on as those before it: what was found in them is kept.
    for text in [*texts, *itertools.accumulate(texts)] * 2:
        ids = whole(backend, text)
        assert encoder.encode(text) == ids


def test_what_is_kept_has_a_bound(tokenizers):
    backend = tokenizers["smollm"]._backend
    encoder = PieceEncoder(backend, ControlFinder(finding(backend)), keep=10_000)
    texts = [f"<|im_start|>{number} is one of many" for number in range(200)]
    for text in texts:
        assert encoder.encode(text) == encode_ids(backend, text)
    # At least 200 bytes each.
    assert 10 < len(encoder._ids) < 50
    assert texts[-1] in encoder._ids
    encoder.encode("<|im_start|>" + "x" * 20_000)
    assert not encoder._ids
    assert encoder._bytes == 0


@pytest.mark.parametrize(
    ("tokens", "normalizer", "text"),
    [
        # Of the whole text only the first is a token: with "word" beside it the second does not stand alone.
        (
            [AddedToken("<a>", single_word=True, normalized=False), AddedToken("word", special=True, normalized=False)],
            0,
            "<a>word",
        ),
        # Normalising prepends an x to the text, not to the token within.
        ([AddedToken("<a>", special=True, normalized=True)], 2, "12x<a>12"),
    ],
)
def test_a_text_is_not_cut_where_its_parts_would_be_read_otherwise(tokens, normalizer, text):
    backend = byte_level(tokens, NORMALIZERS[normalizer], SPLITS[1])
    assert PieceEncoder(backend, ControlFinder(finding(backend))).encode(text) == whole(backend, text)


@given(backends(), st.lists(st.lists(st.sampled_from(PARTS), max_size=8).map("".join), min_size=2, max_size=5))
@settings(deadline=None, max_examples=200)
def test_a_text_that_goes_on_is_searched_from_there_with_the_same_result(backend, texts):
    found = finding(backend)
    kept = ControlFinder(found)
    for text in itertools.accumulate(texts):
        whole(backend, text)
        assert kept.find(text) == ControlFinder(found).find(text)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tokenizer_folders(tmp_path_factory.mktemp("tokenizers"))
    return {family: Tokenizer.from_folder(root / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_twice_the_turns_encode_twice_the_text(tokenizers, family, monkeypatch):
    """Counted: characters given to the tokenizer and searched for control tokens."""
    counts = {"encoded": 0, "searched": 0}

    def counted(name, call):
        def count(backend, text):
            counts[name] += len(text)
            return call(backend, text)

        return count

    monkeypatch.setattr(control_tokens, "encode_ids", counted("encoded", encode_ids))
    monkeypatch.setattr(control_tokens, "encode_offsets", counted("searched", control_tokens.encode_offsets))
    few, many = (characters(tokenizers[family], turns, counts) for turns in (40, 80))
    assert few["encoded"] > 0
    # Of the prompt's few texts of the template's own, each turn is searched four times.
    assert many["encoded"] < 2.1 * few["encoded"]
    assert many["searched"] < 2.2 * few["searched"]


def characters(tokenizer: Tokenizer, turns: int, counts: dict[str, int]) -> dict[str, int]:
    counts.update(encoded=0, searched=0)
    reader = RecordReader(Tokenizer(*tokenizer.__reduce__()[1]), tokenizer.eos_ids, True, Limits(10**6))
    messages = [
        {"role": role, "content": f"the {role} says {turn} and more of it"}
        for turn in range(turns)
        for role in ("user", "assistant")
    ]
    samples, left_out = reader.samples({"messages": messages}, "file", 1)
    assert sum(len(sample.turns) for sample in samples) == turns
    assert not left_out
    return dict(counts)
