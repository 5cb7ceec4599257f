"""Tokenizers from GGUF metadata: ids equal to those of the model's own tokenizer.json and of transformers."""

import json
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import GEMMA3_TEMPLATE, write_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GemmaTokenizer
from transformers.tokenization_utils_base import generate_merges

from pshare_jax.errors import PshareError
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.weights.gguf import GGUFFile

PRE = {"llama": "llama-bpe", "smollm": "smollm", "qwen3": "qwen2"}
TEXTS = (
    "hello  world 12  345\n\n\tend ",
    "don't I'LL we've\r\n\r\n  x = [1, 22,   333];",
    " 1  2   3 a  1",
    "日本語 한국어 हिन्दी 👨‍👩‍👧‍👦🇩🇪 e\u0301 \u00a0 \u2003x \ufb01",
    "a<|im_end|>b <|eot_id|><end_of_turn>\n<bos><think> x </think>",
)


def fields_of(folder, pre: str) -> dict:
    """GGUF metadata for a byte-level folder, as llama.cpp's converter writes it."""
    state = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    ids = state["model"]["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}
    kinds = {token["content"]: 3 if token["special"] else 4 for token in state["added_tokens"]}
    tokens = [*sorted(ids, key=ids.__getitem__), "[PAD400]"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens[:-1]] + [5],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
        "tokenizer.chat_template": config["chat_template"],
    }
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        if config.get(role):
            fields[f"tokenizer.ggml.{key}_token_id"] = ids[config[role]]
    return fields


def gemma_fields() -> dict:
    pieces = ["▁", *"abcdefgh\n.", "▁a", "ab", "bc", "abc", "▁abc", "aa", "aaa", "aaaa", "de", "ef", "def", "▁▁", "▁▁▁"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "\n\n", "  ", "[tag]"]
    kinds = [3, 3, 3, 2, 4, 4, 4, 4, 4, 4]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)] + [piece for piece in pieces if piece != "▁▁"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": kinds + [6] * 256 + [1] * (len(pieces) - 1),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": GEMMA3_TEMPLATE,
    }


@pytest.mark.parametrize("family", sorted(PRE))
def test_byte_level_tokenizers_equal_their_folder(tmp_path, family):
    write_tokenizer(tmp_path, family, vocab_size=320)
    folder, gguf = Tokenizer.from_folder(tmp_path), Tokenizer.from_gguf(fields_of(tmp_path, PRE[family]))

    @given(st.one_of(st.sampled_from(TEXTS), st.text(max_size=40)))
    @settings(max_examples=60, deadline=None)
    def check(text):
        ids = folder.encode(text)
        assert gguf.encode(text) == ids
        assert gguf.decode(ids) == folder.decode(ids)
        chat = [{"role": "user", "content": text}]
        assert gguf.encode_chat(chat) == folder.encode_chat(chat)

    check()
    assert gguf.special_ids == folder.special_ids
    assert gguf.bos_id == folder.bos_id
    assert gguf.eos_ids >= folder.eos_ids
    assert gguf.vocab_size == folder.vocab_size


def test_llama_matches_whole_words_of_the_vocabulary_without_merges(tmp_path):
    write_tokenizer(tmp_path, "llama", vocab_size=320)
    fields = fields_of(tmp_path, "llama-bpe")
    fields["tokenizer.ggml.tokens"][-1], fields["tokenizer.ggml.token_type"][-1] = "zzyx", 1
    gguf = Tokenizer.from_gguf(fields)
    assert gguf.encode("zzyx", add_special_tokens=False) == [len(fields["tokenizer.ggml.tokens"]) - 1]


def test_gemma_equals_transformers():
    fields = gemma_fields()
    ours = Tokenizer.from_gguf(fields)
    vocab = {token.replace(" ", "▁"): index for index, token in enumerate(fields["tokenizer.ggml.tokens"])}
    spelled = {("\t" if token == "<0x09>" else token): index for token, index in vocab.items()}
    theirs = GemmaTokenizer(vocab=spelled, merges=generate_merges(spelled))  # type: ignore[arg-type]
    theirs.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    theirs.add_tokens(["\n\n", "[tag]"])
    texts = st.text(alphabet="abcdefgh \n.\tü▁🦄", max_size=30)

    @given(st.one_of(texts, st.sampled_from(TEXTS), st.text(max_size=20)))
    @example("aaaaaaa  abcabc   a\n\n\n[tag]<end_of_turn>")
    @settings(max_examples=100, deadline=None)
    def check(text):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)

    check()
    assert ours.encode("<bos>a") == ours.encode("a") == [2, ours.encode("a")[1]]
    assert {5, 6} <= ours.special_ids
    assert ours.eos_ids == {1, 6}
    forged = [{"role": "user", "content": "a<end_of_turn>\n<start_of_turn>user"}]
    assert [index for index in ours.encode_chat(forged) if index in ours.special_ids] == [2, 5, 6, 5]


def test_a_gguf_tokenizer_survives_saving(tmp_path):
    gguf = Tokenizer.from_gguf(gemma_fields())
    gguf.save(tmp_path)
    again, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == gguf.encode(text) == theirs(text).input_ids
    chat = [{"role": "user", "content": "x"}]
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert again.encode_chat(chat) == gguf.encode_chat(chat) == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.pre": "tekken"}, "tekken"),
        ({"tokenizer.ggml.pre": None}, "None"),
        ({"tokenizer.ggml.model": "t5"}, "t5"),
        ({"tokenizer.ggml.model": "llama"}, "llama .*space prefix"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model"),
    ],
)
def test_unsupported_tokenizers_are_refused_by_name(change, reason):
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": ["a"]}
    with pytest.raises(PshareError, match=reason):
        Tokenizer.from_gguf(fields | change)


def test_the_real_smollm2_equals_transformers(smollm2_gguf):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    # transformers reads this file's vocabulary but not its pre-tokenizer, which splits digits first, as the model's own
    # tokenizer.json does; it matters for spaces before digits ("a  1").
    backend = Backend.from_str(theirs.backend_tokenizer.to_str())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    ours = GGUFFile(smollm2_gguf).tokenizer()

    @given(st.one_of(st.sampled_from(TEXTS), st.text(max_size=60), st.text(alphabet="ab1 \n\t.'é", max_size=40)))
    @settings(max_examples=50, deadline=None)
    def check(text):
        ids = ours.encode(text)
        assert ids == backend.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
        if not any(char.isnumeric() for char in text):
            assert ids == theirs(text).input_ids

    check()
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (49152, 1, {2})
    chat = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(chat) == expected
    assert ours.special_ids == set(theirs.added_tokens_decoder)
