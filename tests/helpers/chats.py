"""Chat messages and tiny tokenizers for the tests of chat templates."""

import json
from pathlib import Path

from tiny_tokenizer import write_tokenizer

from pshare_jax.text.tokenizer import Tokenizer

FAMILIES = ("llama", "smollm", "qwen3", "gemma3")
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}


def tokenizer_folders(root: Path) -> Path:
    for family in FAMILIES:
        write_tokenizer(root / family, family, vocab_size=320)
    return root


def tokenizer_with_template(root, tmp_path, family: str, template, **config) -> Tokenizer:
    """A family's tokenizer with another chat template."""
    content = json.loads((root / family / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((root / family / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**content, "chat_template": template, **config}))
    return Tokenizer.from_folder(tmp_path)


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [index for index in ids if index in tokenizer.special_ids]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]
