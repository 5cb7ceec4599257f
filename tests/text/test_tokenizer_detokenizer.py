"""The incremental detokenizer: pushes + flush == decode(all ids) for any ids, and only whole characters."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import write_tokenizer
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from pshare_jax.errors import PshareError
from pshare_jax.text.detokenizer import token_bytes_for
from pshare_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.host
HARD = "🦄 👨‍👩‍👧‍👦 🇩🇪🇫🇷 안녕하세요 각 हिन्दी क्षि e\u0301 ﷽ \ufffd ok"


def stripping() -> Tokenizer:
    """Llama-2-like: byte fallback, and the decoder strips one space at the start of the text."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "▁▁", "▁a", "b", "é", "<x>", "<0x2>", "\ufffd"):
        vocab[piece] = len(vocab)
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<x>", special=False), AddedToken("▁ö ", special=False)])
    return Tokenizer(backend, {"eos_token": "</s>"}, {})


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    made = {"stripping": stripping()}
    for family in ("llama", "qwen3", "gemma3"):
        write_tokenizer(root / family, family, vocab_size=320)
        made[family] = Tokenizer.from_folder(root / family)
    return made


def deltas_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.detokenizer()
    return [*map(stream.push, ids), stream.flush()]


@pytest.mark.parametrize("name", ["stripping", "llama", "qwen3", "gemma3"])
def test_streams_of_any_ids_equal_decode(tokenizers, name):
    tokenizer = tokenizers[name]
    flat = lambda runs: [index for run in runs for index in run]  # noqa: E731
    any_id = st.integers(0, tokenizer.vocab_size + 3)
    bytes_of = {tokenizer.token_bytes(index): index for index in range(tokenizer.vocab_size)}
    raw = st.one_of(st.binary(max_size=12), st.text(max_size=6).map(str.encode), st.sampled_from([b" ", b"\xe2\x82"]))
    byte_ids = raw.map(lambda data: [bytes_of[bytes([byte])] for byte in data if bytes([byte]) in bytes_of])
    ids = st.lists(st.one_of(byte_ids, st.lists(any_id, max_size=4)), max_size=8).map(flat)

    @given(ids)
    @settings(max_examples=150, deadline=None)
    def check(ids):
        whole, deltas = tokenizer.decode(ids), deltas_of(tokenizer, ids)
        assert "".join(deltas) == whole
        if "\ufffd" not in whole:
            assert not any("\ufffd" in delta for delta in deltas)

    check()


@pytest.mark.parametrize("name", ["stripping", "llama", "qwen3", "gemma3"])
def test_texts_stream_in_whole_characters_wherever_they_are_cut(tokenizers, name):
    """A1-10, A1-12: no delta contains part of a character; a truncated text is the same streamed and decoded whole."""
    tokenizer = tokenizers[name]

    @given(st.text(max_size=20))
    @example(HARD)
    @settings(max_examples=20, deadline=None)
    def check(text):
        ids = tokenizer.encode(text, add_special_tokens=False)
        deltas = deltas_of(tokenizer, ids)
        assert "".join(deltas) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(deltas)
        for cut in range(len(ids)):
            assert "".join(deltas_of(tokenizer, ids[:cut])) == tokenizer.decode(ids[:cut])

    check()


def test_characters_are_emitted_as_soon_as_they_are_final(tokenizers):
    tokenizer = tokenizers["llama"]
    ids = tokenizer.encode("é🦄a", add_special_tokens=False)
    assert deltas_of(tokenizer, ids) == ["", "é", "", "", "", "🦄", "a", ""]
    gemma = tokenizers["gemma3"]
    # A byte run is final only once it has ended.
    assert deltas_of(gemma, gemma.encode("éa", add_special_tokens=False)) == ["", "", "éa", ""]


def test_control_tokens_do_not_end_a_character(tokenizers):
    tokenizer = tokenizers["llama"]
    first, second = tokenizer.encode("é", add_special_tokens=False)
    ids = [first, min(tokenizer.special_ids), second]
    assert deltas_of(tokenizer, ids) == ["", "", "é", ""]


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_unknown_decoders_are_refused_by_name(decoder):
    with pytest.raises(PshareError, match="WordPiece" if decoder else "null"):
        token_bytes_for(decoder)
