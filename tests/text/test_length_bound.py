"""A text's length shows that it has too many tokens only if it does; long texts are encoded without Python's lock."""

import json
import sys
import threading
import time
import unicodedata
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import byte_alphabet, write_tokenizer
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pshare_jax.text.encoder import PromptTooLong
from pshare_jax.text.length_bound import NFC_SHRINKS, length_bound
from pshare_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.host
FAMILIES = ("llama", "smollm", "qwen3", "gemma3")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for family in FAMILIES:
        write_tokenizer(folder / family, family, vocab_size=340)
    return {family: Tokenizer.from_folder(folder / family) for family in FAMILIES}


SPECIAL = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "▁▁", " ▁ ", "    ", " the", "\n\n", "\u1fbe\u0308\u0301"]


@pytest.mark.parametrize("family", FAMILIES)
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(SPECIAL)), max_size=20).map("".join))
def test_no_text_has_fewer_tokens_than_its_length_shows(tokenizers, family, text):
    tokenizer = tokenizers[family]
    count = len(tokenizer.encode(text, add_special_tokens=False))
    assert tokenizer._length_bound is not None
    assert tokenizer.encode(text, refuse_from=count + 1) == tokenizer.encode(text)


@pytest.mark.parametrize("text", ["\x04" * 1000, "\x04ab" * 500, "a\U00040000" * 300])
def test_bytes_outside_the_vocabulary_do_not_count(tokenizers, text):
    """SmolLM2 has no token for some control characters and drops them."""
    state = json.loads(tokenizers["smollm"]._backend.to_str())
    for char in (byte_alphabet()[byte] for byte in (0x04, 0xF1)):
        del state["model"]["vocab"][char]
    tokenizer = Tokenizer(Backend.from_str(json.dumps(state)), {}, {})
    assert tokenizer._length_bound is not None
    assert tokenizer._length_bound.dropped == b"\x04\xf1"
    count = len(tokenizer.encode(text))
    assert count < len(text.encode())
    assert len(tokenizer.encode(text, refuse_from=count + 1)) == count


def test_nfc_shrinks_no_text_more_than_the_bound():
    """Each decomposed character may come from the longest character that decomposes to it alone."""
    chars = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    longest: defaultdict[str, int] = defaultdict(int)
    for char in chars:
        parts = unicodedata.normalize("NFD", char)
        if len(parts) == 1:
            longest[parts] = max(longest[parts], len(char.encode()))
    kept = [char for char in chars if unicodedata.normalize("NFC", char) == char]
    worst = max(sum(longest[part] for part in unicodedata.normalize("NFD", char)) / len(char.encode()) for char in kept)
    assert 3 < worst <= NFC_SHRINKS


def test_pipelines_that_drop_text_have_no_bound(tokenizers):
    def bound(change):
        backend = Backend.from_str(tokenizers["smollm"]._backend.to_str())
        change(backend)
        found = length_bound(backend, [b"abcd"])
        return found and found.max_bytes

    assert bound(lambda backend: None) == 4
    assert bound(lambda backend: setattr(backend, "normalizer", normalizers.NFC())) == 16
    split = pre_tokenizers.Sequence([pre_tokenizers.Split("x", "removed"), pre_tokenizers.ByteLevel()])
    for name, part in (
        ("normalizer", normalizers.Strip()),
        ("normalizer", normalizers.Replace("aa", "a")),
        ("pre_tokenizer", pre_tokenizers.Whitespace()),
        ("pre_tokenizer", split),
        ("model", models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>", fuse_unk=True)),
        ("model", models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    ):
        assert bound(lambda backend, name=name, part=part: setattr(backend, name, part)) is None
    assert bound(lambda backend: backend.add_tokens([AddedToken("<mask>", lstrip=True)])) is None


def test_a_too_long_prompt_is_refused_with_the_tokens_that_it_has_at_least(tokenizers):
    tokenizer = tokenizers["smollm"]
    text = "x" * 1000 * tokenizer._length_bound.max_bytes
    for call in (
        lambda limit: tokenizer.encode(text, refuse_from=limit),
        lambda limit: tokenizer.encode_chat([{"role": "user", "content": text}], refuse_from=limit),
    ):
        with pytest.raises(PromptTooLong) as caught:
            call(900)
        assert 1000 <= caught.value.least <= 1010
        call(2000)


@pytest.mark.parametrize("text", ["the quick brown fox ", "1234567890", "<|im_end|>"])
def test_other_threads_run_while_a_long_text_is_encoded(tokenizers, text):
    tokenizer, text = tokenizers["smollm"], text * (2_000_000 // len(text))
    ids: list[int] = []
    for work in (
        lambda: ids.extend(tokenizer.encode(text)),
        lambda: tokenizer.encode(text, allow_special=False),
        lambda: tokenizer.encode_chat([{"role": "user", "content": text}]),
        lambda: tokenizer.decode(ids),
    ):
        thread = threading.Thread(target=work)
        worst, last = 0.0, time.perf_counter()
        thread.start()
        while thread.is_alive():
            time.sleep(0.005)
            now = time.perf_counter()
            worst, last = max(worst, now - last), now
        assert worst < 0.4


def test_long_texts_have_the_ids_of_short_ones(tokenizers):
    for tokenizer in tokenizers.values():
        text = "the user  and the 123 \n\n assistant 😀 " * 300
        alone = tokenizer._backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False) == alone
        assert tokenizer.decode(alone) == tokenizer._backend.decode(alone)
