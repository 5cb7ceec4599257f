"""A tokenizer from GGUF metadata, built with `tokenizers` alone (transformers would need torch for it).

`Tokenizer.from_gguf` is the caller. A GGUF file holds a vocabulary, merges and a pre-tokenizer's keyword; the pipeline
for each keyword is that of the model's own tokenizer.json. Supported: gpt2 with pre smollm, llama-bpe or qwen2, and
Gemma's SentencePiece vocabulary.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from pshare_jax.errors import PshareError
from pshare_jax.text.hf_files import add_special

_CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 3, 4, 5, 6
_PADDING = re.compile(r"\[PAD\d+\]")
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

# End-of-turn tokens of the supported families; GGUF files often name only end-of-text, or type Gemma's as ordinary.
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")
_GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class _Pipeline(NamedTuple):
    split: str | None  # None: digits apart, then byte-level's own pattern
    nfc: bool
    ignore_merges: bool
    adds_bos: bool


_PIPELINES = {
    "smollm": _Pipeline(None, nfc=False, ignore_merges=False, adds_bos=False),
    "llama-bpe": _Pipeline(rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", nfc=False, ignore_merges=True, adds_bos=True),
    "qwen2": _Pipeline(rf"{_WORDS}|\p{{N}}|{_REST}", nfc=True, ignore_merges=False, adds_bos=False),
}


def read_gguf(fields: Mapping[str, Any]) -> tuple[Backend, dict[str, Any], dict[str, str], frozenset[int]]:
    """Backend, config (as in tokenizer_config.json), chat templates and end-of-turn ids from `tokenizer.*` metadata."""
    source = fields.get("tokenizer.chat_template")
    if source is not None and not isinstance(source, str):
        raise PshareError("The GGUF file's tokenizer.chat_template must be a string.")
    try:
        backend, config, turn_ends = _build(fields)
    except PshareError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise PshareError(f"The GGUF file's tokenizer metadata is malformed: {error!r}.") from error
    return backend, config, {"default": source} if source else {}, turn_ends


def _build(fields: Mapping[str, Any]) -> tuple[Backend, dict[str, Any], frozenset[int]]:
    name = fields.get("tokenizer.ggml.model")
    if name is None or "tokenizer.ggml.tokens" not in fields:
        raise PshareError(
            "The GGUF file has no tokenizer (tokenizer.ggml.model or tokens is missing); use another file."
        )
    tokens = list(fields["tokenizer.ggml.tokens"])
    types = list(fields.get("tokenizer.ggml.token_type") or [1] * len(tokens))
    if name == "gpt2":
        backend, adds_bos = _byte_level(fields, tokens, types)
    elif name == "llama" and fields.get("tokenizer.ggml.add_space_prefix") is False:
        backend, adds_bos = _gemma(tokens, types), True
    else:
        what = "llama (SentencePiece with a space prefix)" if name == "llama" else name
        raise PshareError(_unknown(what))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, key in _ROLES.items():
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        config[role] = tokens[index] if index is not None and 0 <= index < len(tokens) else None
    ends = _turn_ends(fields, tokens)
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    special += [config[role] for role in _ROLES if config[role]] + [tokens[index] for index in sorted(ends)]
    special += [token for token in _GEMMA_TURNS if name == "llama" and token in tokens]
    add_special(backend, list(dict.fromkeys(special)))
    ordinary = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    _add_user_defined(backend, ordinary, set(special))
    first = config["bos_token"] if fields.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    last = config["eos_token"] if fields.get("tokenizer.ggml.add_eos_token", False) else None
    _add_framing(backend, first, last)
    return backend, config, ends


def _add_framing(backend: Backend, first: str | None, last: str | None) -> None:
    """Makes text prompts begin with the token `first` and end with `last`."""
    special = [(text, backend.token_to_id(text)) for text in (first, last) if text is not None]
    if special:
        rule = [*([f"{first}:0"] if first is not None else []), "$A:0", *([f"{last}:0"] if last is not None else [])]
        processor = processors.TemplateProcessing(single=rule, special_tokens=special)
        backend.post_processor = processor  # type: ignore[assignment]


def _unknown(what: str) -> str:
    return (
        f"The GGUF tokenizer {what} is not supported; supported are gpt2 with pre = {', '.join(_PIPELINES)}, "
        "and llama in Gemma's form. Use the model's Hugging Face folder instead."
    )


def _byte_level(fields: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[Backend, bool]:
    pre = fields.get("tokenizer.ggml.pre")
    pipeline = _PIPELINES.get(str(pre))
    if pipeline is None:
        raise PshareError(_unknown(f"gpt2 with pre = {pre}"))
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges") or []]
    model = models.BPE(vocab=_vocab(tokens, types), merges=merges, ignore_merges=pipeline.ignore_merges)
    backend = Backend(model)
    if pipeline.nfc:
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    if pipeline.split is None:
        split, own_pattern = pre_tokenizers.Digits(individual_digits=True), True
    else:
        split, own_pattern = pre_tokenizers.Split(Regex(pipeline.split), behavior="isolated"), False
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_pattern)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend, pipeline.adds_bos


def _vocab(tokens: list[str], types: list[int]) -> dict[str, int]:
    """Text -> id, without the entries that only pad the embedding."""
    pairs = enumerate(zip(tokens, types, strict=True))
    return {text: index for index, (text, kind) in pairs if not (kind == _UNUSED and _PADDING.fullmatch(text))}


def _gemma(tokens: list[str], types: list[int]) -> Backend:
    # llama.cpp stores user-defined runs of spaces as spaces; the vocabulary spells them "▁▁".
    spelled = [
        text.replace(" ", "▁") if kind == _USER_DEFINED else text for text, kind in zip(tokens, types, strict=True)
    ]
    if "\t" not in spelled and "<0x09>" in spelled:
        spelled[spelled.index("<0x09>")] = "\t"  # older Gemma files have the tab only as a byte token, but merge it
    vocab = _vocab(spelled, types)
    whole = {text for text, kind in zip(spelled, types, strict=True) if kind in (_CONTROL, _BYTE)} - {"\t"}
    unknown = next((text for text, kind in zip(spelled, types, strict=True) if kind == 2), None)
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges_of(vocab, whole), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # type: ignore[assignment]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    return backend


def merges_of(vocab: Mapping[str, int], whole: set[str]) -> list[tuple[str, str]]:
    """BPE merges that a SentencePiece vocabulary implies: every split of a piece into two pieces, best piece first.

    Gemma's pieces are ranked by id (their scores have the same order); the splits of one piece by the length of the left
    part. Pieces in `whole` are never merged.
    """
    merges = []
    for piece in sorted(vocab.keys() - whole, key=vocab.__getitem__):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab and left not in whole and right not in whole:
                merges.append((left, right))
    return merges


def _turn_ends(fields: Mapping[str, Any], tokens: list[str]) -> frozenset[int]:
    keys = ("eos", "eot", "eom")
    named = {fields.get(f"tokenizer.ggml.{key}_token_id") for key in keys}
    ends = {index for index in named if isinstance(index, int) and 0 <= index < len(tokens)}
    return frozenset(ends | {tokens.index(text) for text in _TURN_ENDS if text in tokens})


def _add_user_defined(backend: Backend, texts: list[str], special: set[str]) -> None:
    """Adds tokens such as <think>, which are matched whole but are otherwise ordinary text."""
    vocab = backend.get_vocab()
    added = [
        AddedToken(text, special=False, normalized=False) for text in texts if text in vocab and text not in special
    ]
    backend.add_tokens(added)
