"""Tokenizer folders for the tests' tiny models: real file formats, a few hundred ids, chat templates of our own.

`write_tokenizer(folder, family, vocab_size=320)` writes tokenizer.json and tokenizer_config.json as the family does
them: the same pipeline (byte-level or SentencePiece-like), the same kind of control tokens, and a template with the
family's traps (trimming, think blocks, folded system turns). Used by every test that needs a model that can chat.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CHATML_TEMPLATE = """\
{%- for message in messages %}
{%- if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}
{%- for call in message['tool_calls'] or [] %}
{{- '\\n' + (call['function'] | tojson) }}
{%- endfor %}
{{- '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- set role = 'ipython' if message.role == 'tool' else message.role %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- if message.content %}
{{- message.content | trim }}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<|python_tag|>' }}
{{- {'name': call.function.name, 'parameters': call.function.arguments} | tojson }}
{%- endfor %}
{{- '<|eom_id|>' if message.tool_calls else '<|eot_id|>' }}
{%- if loop.first and tools %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nTools:\\n' }}
{%- for tool in tools %}
{{- (tool | tojson(indent=2)) + '\\n' }}
{%- endfor %}
{{- '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Qwen3's traps: history loses its think blocks (split on </think>), a turn after the last real question keeps them,
# tool answers are wrapped into one user turn, thinking turned off writes an empty think block into the prompt only.
QWEN3_TEMPLATE = """\
{%- macro turn(role, text) %}
{{- '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}
{%- endmacro %}
{%- macro calls(message, text) %}
{%- for call in message.tool_calls or [] %}
{%- set call = call.function or call %}
{%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson %}
{{- '' if loop.first and not text else '\\n' }}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + arguments + '}\\n</tool_call>' }}
{%- endfor %}
{%- endmacro %}
{%- set rest = messages %}
{%- set lead = '' %}
{%- if messages[0].role == 'system' %}
{%- set lead = messages[0].content %}
{%- set rest = messages[1:] %}
{%- endif %}
{%- if tools %}
{%- set listed = tools | map('tojson') | join('\\n') %}
{%- set how = 'Call one as <tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>' %}
{%- set lead = (lead + '\\n\\n' if lead else '') + '<tools>\\n' + listed + '\\n</tools>\\n' + how %}
{%- endif %}
{%- if tools or rest | length < messages | length %}
{{- turn('system', lead) }}
{%- endif %}
{%- set asked = namespace(last=-1) %}
{%- for message in rest %}
{%- set text = message.content or '' %}
{%- if message.role == 'user' and not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
{%- set asked.last = loop.index0 %}
{%- endif %}
{%- endfor %}
{%- for message in rest %}
{%- if message.role == 'assistant' %}
{%- set before, mark, text = (message.content or '').rpartition('</think>') %}
{%- set thought = message.reasoning_content or before.rpartition('<think>')[2] %}
{%- set text = text.lstrip('\\n') if mark else text %}
{%- if loop.index0 > asked.last and (thought or loop.last) %}
{%- set shown = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') %}
{%- else %}
{%- set shown = text %}
{%- endif %}
{{- turn('assistant', shown + calls(message, text)) }}
{%- elif message.role == 'tool' %}
{{- '' if loop.previtem and loop.previtem.role == 'tool' else '<|im_start|>user' }}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{{- '' if loop.nextitem and loop.nextitem.role == 'tool' else '<|im_end|>\\n' }}
{%- else %}
{{- turn(message.role, message.content) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '') }}
{%- endif %}
"""

GEMMA3_TEMPLATE = """\
{{- bos_token }}
{%- set lead = '' %}
{%- set turns = messages %}
{%- if messages[0]['role'] == 'system' %}
{%- set lead = messages[0]['content'] + '\\n\\n' %}
{%- set turns = messages[1:] %}
{%- endif %}
{%- for message in turns %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- (lead if loop.first else '') + (message['content'] | trim) + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

BYTE_WORDS = (" the", " and", "ing", "user", "assistant", "system", " is", "er", "on", "at", "\n\n", "    ")
SPM_WORDS = ("▁the", "▁and", "▁▁", "user", "model", "ing", "er", "on")

LLAMA_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<|finetune_right_pad_id|>",
)
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN3_MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
GEMMA_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")


def write_tokenizer(folder: Path, family: str, *, vocab_size: int) -> None:
    """Write a tokenizer of at most `vocab_size` ids into `folder`; family: llama, smollm (= chatml), qwen3, gemma3."""
    builders = {"llama": _llama, "smollm": _chatml, "chatml": _chatml, "qwen3": _qwen3, "gemma3": _gemma3}
    tokenizer, config = builders[family](vocab_size)
    assert tokenizer.get_vocab_size() <= vocab_size
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def merges_of(words: tuple[str, ...], vocab: dict[str, int], limit: int) -> list[tuple[str, str]]:
    """Left-to-right merges that spell `words`; adds each new piece to `vocab` while it has fewer than `limit` ids."""
    merges: list[tuple[str, str]] = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] in vocab or len(vocab) >= limit:
                continue
            merges.append((word[: end - 1], word[end - 1]))
            vocab[word[:end]] = len(vocab)
    return merges


def byte_alphabet() -> dict[int, str]:
    """Byte -> the character that byte-level vocabularies write it as."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (chr(256 + index) for index in range(256))
    return {byte: chr(byte) if byte in plain else next(others) for byte in range(256)}


def _byte_level(vocab_size: int, specials: tuple[str, ...], markers: tuple[str, ...] = ()) -> Tokenizer:
    alphabet = byte_alphabet()
    vocab = {alphabet[byte]: byte for byte in range(256)}
    words = tuple("".join(alphabet[byte] for byte in word.encode()) for word in BYTE_WORDS)
    merges = merges_of(words, vocab, vocab_size - len(specials) - len(markers))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in markers])
    return tokenizer


def _split_then_bytes(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _prepend(token: str, token_id: int | None) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, token_id)])


def _llama(vocab_size: int) -> tuple[Tokenizer, dict]:
    tokenizer = _byte_level(vocab_size, LLAMA_SPECIALS)
    tokenizer.pre_tokenizer = _split_then_bytes(LLAMA3_SPLIT)  # type: ignore[assignment]
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = _prepend(bos, tokenizer.token_to_id(bos))  # type: ignore[assignment]
    return tokenizer, {
        "bos_token": bos,
        "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
        "chat_template": LLAMA_TEMPLATE,
    }


def _chatml(vocab_size: int) -> tuple[Tokenizer, dict]:
    tokenizer = _byte_level(vocab_size, CHATML_SPECIALS)
    digits = pre_tokenizers.Digits(individual_digits=True)
    steps = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    return tokenizer, {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHATML_TEMPLATE,
    }


def _qwen3(vocab_size: int) -> tuple[Tokenizer, dict]:
    tokenizer = _byte_level(vocab_size, CHATML_SPECIALS, QWEN3_MARKERS)
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = _split_then_bytes(QWEN2_SPLIT)  # type: ignore[assignment]
    return tokenizer, {
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": QWEN3_TEMPLATE,
    }


def _gemma3(vocab_size: int) -> tuple[Tokenizer, dict]:
    vocab = {text: index for index, text in enumerate(GEMMA_SPECIALS)}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + list("▁aeiostnrlmdu.,\ngh"):
        vocab[piece] = len(vocab)
    merges = merges_of(SPM_WORDS, vocab, vocab_size)
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # type: ignore[assignment]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in GEMMA_SPECIALS])
    tokenizer.post_processor = _prepend("<bos>", 2)  # type: ignore[assignment]
    return tokenizer, {
        "add_bos_token": True,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": GEMMA3_TEMPLATE,
    }
