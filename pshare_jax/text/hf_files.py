"""Reads and writes the tokenizer files of a Hugging Face folder: tokenizer.json, tokenizer_config.json, chat templates.

`Tokenizer.from_folder` and `Tokenizer.save` are the callers. The files are interpreted as in transformers (named and
extra special tokens, the explicit BOS/EOS switches, every location of a chat template), without importing it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from pshare_jax.errors import PshareError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA_LISTS = ("additional_special_tokens", "extra_special_tokens")


def read_folder(folder: Path) -> tuple[Backend, dict[str, Any], dict[str, str]]:
    """The backend with every special token added, the config (special tokens as strings), chat templates by name."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise PshareError(
            f"{folder} has no tokenizer.json; convert its tokenizer with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the Rust library raises bare Exception
        raise PshareError(f"The tokenizers library cannot read {file}: {error}.") from error
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _read_json(folder / "special_tokens_map.json")
    try:
        templates = _templates(folder, config.pop("chat_template", None))
        _add_special_tokens(backend, config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise PshareError(f"The tokenizer files in {folder} are malformed: {error!r}.") from error
    if not all(isinstance(template, str) for template in templates.values()):
        raise PshareError(f"A chat template in {folder} is not a string.")
    return backend, _with_texts(config), templates


def write_folder(folder: Path, backend: Backend, config: Mapping[str, Any], templates: Mapping[str, str]) -> None:
    """Writes the files so that transformers' AutoTokenizer and `read_folder` load the same tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    body = dict(config)
    jinja = folder / "chat_template.jinja"
    # Templates of an earlier save would take precedence.
    for old in (jinja, folder / "chat_template.json", *(folder / "additional_chat_templates").glob("*.jinja")):
        old.unlink(missing_ok=True)
    if list(templates) == ["default"]:
        jinja.write_text(templates["default"], encoding="utf-8")
    elif templates:
        body["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    text = json.dumps(body, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def add_special(backend: Backend, texts: list[str]) -> None:
    """Makes `texts` special tokens of `backend`; existing tokens keep their id and matching flags."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for text in texts:
        old = added.get(text)
        if old is None:
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif not old.special:
            flags = {name: getattr(old, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            backend.add_special_tokens([AddedToken(text, special=True, **flags)])


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PshareError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise PshareError(f"{file} must contain one JSON object.")
    return content


def _templates(folder: Path, in_config: Any) -> dict[str, str]:
    """Files take precedence over the config, as in transformers; chat_template.json is the oldest location."""
    files = {"default": folder / "chat_template.jinja"} if (folder / "chat_template.jinja").is_file() else {}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if files:
        # Read as bytes: Jinja itself normalises line ends.
        return {name: file.read_bytes().decode("utf-8") for name, file in files.items()}
    if in_config is None:
        in_config = _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(in_config, str):
        return {"default": in_config}
    if isinstance(in_config, list):
        return {entry["name"]: entry["template"] for entry in in_config}
    return dict(in_config or {})


def _add_special_tokens(backend: Backend, config: Mapping[str, Any]) -> None:
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder", {})
    for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if token["content"] not in known:
            backend.add_tokens([_added_token(token)])
    named = [value for key, value in config.items() if key.endswith("_token") and isinstance(value, str | dict)]
    extra: list[Any] = []
    for key in _EXTRA_LISTS:
        tokens = config.get(key) or []
        extra += list(tokens.values()) if isinstance(tokens, dict) else list(tokens)
    add_special(backend, [text for text in map(_text, [*named, *extra]) if text])


def _added_token(token: Mapping[str, Any]) -> AddedToken:
    flags = {
        name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in token
    }
    return AddedToken(token["content"], **flags)


def _text(token: Any) -> Any:
    """The text of a special token written as an object (older files); any other value unchanged."""
    return token.get("content") if isinstance(token, dict) else token


def _with_texts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _text(value) if key.endswith("_token") else value for key, value in config.items()}
