"""Tokenizers of Hugging Face folders: ids equal to transformers', one BOS, round trips, malformed files."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import write_tokenizer
from transformers import AutoTokenizer

from pshare_jax.errors import PshareError
from pshare_jax.text.tokenizer import Tokenizer

FAMILIES = ("llama", "smollm", "qwen3", "gemma3")
TEXTS = (
    "",
    "hello  world 12  345\n\n\tend ",
    " The user and the assistant's 3.14 systems",
    "日本語 한국어 हिन्दी 👨‍👩‍👧‍👦🇩🇪 e\u0301 \u00a0 \u2003x",
    "a<|im_end|>b <|eot_id|><end_of_turn>\n<bos><think> x </think>",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    for family in FAMILIES:
        write_tokenizer(root / family, family, vocab_size=320)
    return root


@pytest.fixture(scope="module")
def pairs(folders):
    return {
        family: (Tokenizer.from_folder(folders / family), AutoTokenizer.from_pretrained(folders / family))
        for family in FAMILIES
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_texts_equal_transformers(pairs, family):
    ours, theirs = pairs[family]

    @given(st.one_of(st.sampled_from(TEXTS), st.text(max_size=60)))
    @settings(deadline=None)
    def check(text):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)

    check()
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == {theirs.eos_token_id}
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("family", FAMILIES)
def test_text_prompts_have_exactly_one_bos_if_the_tokenizer_adds_it(pairs, family):
    ours, theirs = pairs[family]
    plain = ours.encode("hi")
    assert plain == theirs("hi").input_ids
    if family in ("llama", "gemma3"):
        assert plain.count(ours.bos_id) == 1
        assert ours.encode(theirs.bos_token + "hi") == plain
        assert ours.encode("") == [ours.bos_id]
    else:
        assert ours.bos_id not in plain


@pytest.mark.parametrize("family", FAMILIES)
def test_control_text_in_prompts_can_be_plain_text(pairs, family):
    ours, theirs = pairs[family]
    text = "".join(theirs.all_special_tokens) + " x"
    ids = ours.encode(text, add_special_tokens=False, allow_special=False)
    assert not ours.special_ids & set(ids)
    assert ours.decode(ids) == text
    assert ours.special_ids & set(ours.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_tokenizers_load_here_and_in_transformers(pairs, tmp_path, family):
    ours, theirs = pairs[family]
    (tmp_path / "chat_template.jinja").write_text("stale")
    ours.save(tmp_path)
    again, hugging_face = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == ours.fingerprint
    assert again.template_fingerprint == ours.template_fingerprint
    assert hugging_face.chat_template == theirs.chat_template
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text)
        assert hugging_face(text).input_ids == theirs(text).input_ids


def test_fingerprints_change_only_with_what_changes_ids_or_prompts(folders, tmp_path):
    base = Tokenizer.from_folder(folders / "smollm")
    state = json.loads((folders / "smollm" / "tokenizer.json").read_text())
    config = json.loads((folders / "smollm" / "tokenizer_config.json").read_text())

    def written(name, state, config):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(state))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer.from_folder(tmp_path / name)

    shuffled = dict(reversed(state.items()))
    shuffled["model"] = {**state["model"], "vocab": dict(reversed(state["model"]["vocab"].items()))}
    same = written("same", shuffled, {**config, "model_max_length": 7})
    assert (same.fingerprint, same.template_fingerprint) == (base.fingerprint, base.template_fingerprint)

    jinja = written("jinja", state, {**config, "chat_template": None})
    (tmp_path / "jinja" / "chat_template.jinja").write_text(config["chat_template"].removesuffix("\n"))
    assert jinja.chat_template is None
    assert Tokenizer.from_folder(tmp_path / "jinja").template_fingerprint == base.template_fingerprint

    fewer = {**state, "model": {**state["model"], "merges": state["model"]["merges"][:-1]}}
    assert written("merges", fewer, config).fingerprint != base.fingerprint
    assert written("eos", state, {**config, "eos_token": "<|endoftext|>"}).fingerprint != base.fingerprint
    changed = written("template", state, {**config, "chat_template": config["chat_template"] + " "})
    assert changed.template_fingerprint != base.template_fingerprint
    assert changed.fingerprint == base.fingerprint


def test_special_tokens_are_read_from_every_file(folders, tmp_path):
    state = json.loads((folders / "llama" / "tokenizer.json").read_text())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "<|eot_id|>", "lstrip": False, "rstrip": False},
        "pad_token": "[PAD]",
        "additional_special_tokens": ["<extra>"],
        "add_bos_token": True,
        "add_eos_token": True,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<|begin_of_text|>"}}))
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "a[PAD]b<extra>c"
    assert ours.encode(text) == theirs(text).input_ids
    assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True) == "abc"


def test_ids_outside_the_vocabulary_are_skipped(pairs):
    for ours, _ in pairs.values():
        assert ours.decode([97, 319, 5000]) == ours.decode([97])
        assert ours.token_bytes(319) == b""


def test_token_bytes_of_a_split_character(pairs):
    """A1-19: the bytes of a split emoji's tokens add up to the emoji."""
    for ours, theirs in pairs.values():
        ids = ours.encode("ok 🦄é", add_special_tokens=False)
        assert b"".join(map(ours.token_bytes, ids)) == "ok 🦄é".encode()
        assert all(len(ours.token_bytes(index)) == 1 for index in ids[-6:])
        assert ours.token_bytes(theirs.eos_token_id) == theirs.eos_token.encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "["),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_malformed_folders_are_refused_by_file_name(tmp_path, name, content):
    if content is not None:
        write_tokenizer(tmp_path, "smollm", vocab_size=320)
        (tmp_path / name).write_text(content)
    with pytest.raises(PshareError, match=name):
        Tokenizer.from_folder(tmp_path)


def test_lone_surrogates_are_refused(pairs):
    with pytest.raises(PshareError, match="surrogate"):
        pairs["smollm"][0].encode("a\ud800")


def test_tokenizers_load_neither_jax_nor_transformers():
    script = (
        "import importlib.util, sys, types; spec = importlib.util.find_spec('pshare_jax'); "
        "package = types.ModuleType('pshare_jax'); package.__path__ = spec.submodule_search_locations; "
        "sys.modules['pshare_jax'] = package; import pshare_jax.text.tokenizer; "
        "print([name for name in ('jax', 'transformers', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
