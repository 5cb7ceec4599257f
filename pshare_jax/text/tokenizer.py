"""Text and chats to token ids and back: the library's tokenizer, without transformers.

Model sources make it; the server, training and generation use it. Ids equal transformers' for the same files. Only control
tokens that a chat template itself writes become control ids; text inside messages stays text (control_tokens.py).
"""

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tokenizers import Tokenizer as Backend

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_template import ChatTemplate, checked_messages, plain_data
from pshare_jax.text.control_tokens import ControlText, Placeholders, PlainEncoder, control_finder
from pshare_jax.text.detokenizer import Detokenizer, token_bytes_for
from pshare_jax.text.gguf_tokenizer import read_gguf
from pshare_jax.text.hf_files import SPECIAL_NAMES, read_folder, write_folder
from pshare_jax.text.length_bound import LengthBound, length_bound
from pshare_jax.text.native import decode, encode_ids, encode_offsets


class PromptTooLong(PshareError):
    """A prompt has at least `least` tokens, as its text's length alone shows."""

    def __init__(self, least: int) -> None:
        super().__init__(f"The prompt has at least {least} tokens, which is too long; shorten it.")
        self.least = least


@runtime_checkable
class Encoder(Protocol):
    """What the server needs of a tokenizer; a prompt that cannot be encoded is a PshareError. See `Tokenizer`."""

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """Texts of the named control tokens, such as `eos_token`."""
        ...

    @property
    def special_ids(self) -> Collection[int]:
        """Ids of the control tokens."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The template's source."""
        ...

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True, refuse_from: int | None = None
    ) -> list[int]:
        """Ids of a text prompt."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token."""
        ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        refuse_from: int | None = None,
    ) -> list[int]:
        """Ids of a chat's prompt."""
        ...


class Tokenizer:
    """Immutable, so safe to share between threads."""

    def __init__(
        self,
        backend: Backend,
        config: Mapping[str, Any],
        templates: Mapping[str, str],
        turn_ends: frozenset[int] = frozenset(),
    ) -> None:
        """`config` is tokenizer_config.json's content; `templates` are chat templates by name ("default" first)."""
        self._backend, self._config, self._sources = backend, dict(config), dict(templates)
        self._templates = {name: ChatTemplate(source) for name, source in templates.items()}
        added = backend.get_added_tokens_decoder()
        self._special = {index: token.content for index, token in added.items() if token.special}
        self._variables = {name: config[name] for name in SPECIAL_NAMES if config.get(name)}
        self._variables |= {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, str)}
        self._bytes = token_bytes_for(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)
        self._control = ControlText(list(self._special.values()))
        # Not the unknown token: ordinary text outside the vocabulary becomes it.
        unknown = getattr(backend.model, "unk_token", None)
        self._control_set = frozenset(index for index, text in self._special.items() if text != unknown)
        self.vocab_size: int = backend.get_vocab_size()
        self.special_ids: frozenset[int] = frozenset(self._special)
        self.bos_id: int | None = self._id_of("bos_token")
        self.eos_id: int | None = self._id_of("eos_token")
        self.eos_ids: frozenset[int] = turn_ends | ({self.eos_id} if self.eos_id is not None else set())
        self._prefix, self._suffix = self._framing()

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder; PshareError if tokenizer.json is missing or cannot be read."""
        return cls(*read_folder(Path(path)))

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer that GGUF metadata describes (`tokenizer.*` keys, plain values); unknown kinds are refused."""
        return cls(*read_gguf(fields))

    @property
    def chat_template(self) -> str | None:
        """The template used without tools, None if the model has none."""
        return self._sources.get("default")

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """Texts of the named control tokens, None where the model has none."""
        return {name: self._config.get(name) for name in SPECIAL_NAMES}

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True, refuse_from: int | None = None
    ) -> list[int]:
        """Ids of a text prompt, with one BOS if the tokenizer adds it, also if the text already starts with it.

        Without `allow_special`, control text in `text` is encoded like any other text.

        Raises:
            PromptTooLong: the text's length shows that it has at least `refuse_from` tokens.
            PshareError: the text is not valid Unicode.
        """
        self._check_length(text, refuse_from)
        ids = self._encode(text) if allow_special else self._plain.encode(text)
        if not add_special_tokens:
            return ids
        prefix = [] if self._prefix and ids[: len(self._prefix)] == self._prefix else self._prefix
        return [*prefix, *ids, *self._suffix]

    def encode_completion(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Ids of a text prompt, as `encode` gives them, and of the completion, without an end token.

        Control text in the completion is ordinary text; a token that would span the boundary is split there.
        """
        ids = self.encode(prompt)
        if not self._control.inside(completion):
            joint = self.encode(prompt + completion)
            joint = joint[: len(joint) - len(self._suffix)]
            if joint[: len(ids)] == ids:
                return ids, joint[len(ids) :]
        return ids, self._plain.encode(_valid(completion))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids outside the vocabulary are skipped."""
        return decode(self._backend, ids, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes: part of a character for byte tokens, a control token's text in UTF-8."""
        if token_id in self._special:
            return self._special[token_id].encode("utf-8")
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._bytes.of(token)

    def detokenizer(self) -> Detokenizer:
        """A new stream whose pushes and flush concatenate to `decode(all ids)`."""
        special, token_of = self._special, self._backend.id_to_token
        return self._bytes.detokenizer(lambda index: None if index in special else token_of(index))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        refuse_from: int | None = None,
    ) -> list[int]:
        """The prompt's ids for a chat, as the model's template writes it.

        Without control text in messages, tools and kwargs the ids equal those of transformers' `apply_chat_template`.
        Control text in them is encoded as ordinary text.

        Raises:
            PromptTooLong: the rendered text's length shows that it has at least `refuse_from` tokens.
            PshareError: the model has no template, a role or part is unknown, the template refuses the messages, or it
                would complete message text to a control token.
        """
        try:
            variables = plain_data(template_kwargs or {})
            chat = [checked_messages(messages), plain_data(tools), list(variables.values())]
            return self._encode_checked(chat, list(variables), add_generation_prompt, refuse_from)
        except RecursionError as error:
            raise PshareError("The messages are nested too deeply; flatten them.") from error

    def encode_turn(
        self,
        messages: Sequence[Mapping[str, Any]],
        answer: Mapping[str, Any],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Ids of the prompt for `messages` as `encode_chat` gives it, and of what the template writes for `answer` after it.

        The second part runs to the end of the rendering: the answer, its end-of-turn token, often a line break. A token
        that would span the boundary is split there, since generation starts there. PshareError: as `encode_chat`, and if
        the template does not write the answer right after the prompt.
        """
        prompt = self.encode_chat(messages, tools=tools, template_kwargs=template_kwargs)
        whole = [*messages, answer]
        ids = self.encode_chat(whole, tools=tools, add_generation_prompt=False, template_kwargs=template_kwargs)
        if ids[: len(prompt)] == prompt:
            return prompt, ids[len(prompt) :]
        variables = plain_data(template_kwargs or {})
        chat = [checked_messages(whole), plain_data(tools), list(variables.values())]
        return prompt, self._encode_last(chat, list(variables))

    def _encode_last(self, chat: list[Any], names: list[str]) -> list[int]:
        """Ids of what the template writes for the last message; `chat` and `names` as in `_encode_checked`."""
        template = self._template(chat[1])
        placeholders = self._control.placeholders(chat, template.source)
        messages, *others = placeholders.masked(chat)
        before = self._rendered(template, [messages[:-1], *others], names, True)
        text = self._rendered(template, [messages, *others], names, False)
        if not text.startswith(before):
            raise PshareError("The chat template must write the answer right after its prompt, but does not.")
        text = text[len(before) :]
        return self._encode_masked(text, placeholders) if self._control.inside(chat) else self._encode(text)

    def _encode_checked(
        self, chat: list[Any], names: list[str], add_generation_prompt: bool, refuse_from: int | None
    ) -> list[int]:
        """`chat`: messages, tools, and the values of the template variables called `names`."""
        template = self._template(chat[1])
        plain = self._rendered(template, chat, names, add_generation_prompt)
        self._check_length(plain, refuse_from)
        placeholders = self._control.placeholders(chat, template.source)
        disguised = placeholders.disguised(chat, template.words)
        text = self._rendered(template, disguised, names, add_generation_prompt)
        own = self._control_ids(encode_ids(self._finder, _valid(text)))
        if self._control.inside(chat):
            text = self._rendered(template, placeholders.masked(chat), names, add_generation_prompt)
            ids = self._encode_masked(text, placeholders)
        else:
            ids = self._encode(plain)
        if self._control_ids(ids) != own:
            raise PshareError("The chat template would turn text of the messages into control tokens; rephrase it.")
        return ids

    def _rendered(self, template: ChatTemplate, chat: list[Any], names: list[str], add_generation_prompt: bool) -> str:
        messages, tools, values = chat
        variables = {**self._variables, **dict(zip(names, values, strict=True))}
        return template.render(messages, tools, add_generation_prompt, variables)

    def _encode_masked(self, text: str, placeholders: Placeholders) -> list[int]:
        encoding = encode_offsets(self._backend, _valid(text))
        tokens = zip(encoding.ids, encoding.offsets, strict=True)
        spans = [(start, end, index) for index, (start, end) in tokens if index in self._control_set]
        return self._plain.encode(text, spans, placeholders.restored)

    def _template(self, tools: list | None) -> ChatTemplate:
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise PshareError("The model has no chat template; send a text prompt to /v1/completions instead.")
        return self._templates[name]

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the chat templates; transformers loads the folder."""
        write_folder(Path(folder), self._backend, self._config, self._sources)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that determines the ids of a text: vocabulary, merges, normaliser, splitting, special tokens."""
        backend = self._backend
        tokens = backend.get_added_tokens_decoder().items()
        added = sorted((index, *token.__getstate__().items()) for index, token in tokens)
        framing = [self._prefix, self._suffix, self.bos_id, sorted(self.eos_ids)]
        digest = hashlib.sha256(json.dumps([added, framing]).encode())
        for part in (backend.normalizer, backend.pre_tokenizer, backend.model):
            digest.update(part.__getstate__() if part is not None else b"null")
        return digest.hexdigest()

    @cached_property
    def template_fingerprint(self) -> str:
        """sha256 of the chat templates by name, without a trailing newline (Jinja drops it)."""
        sources = {name: source.replace("\r\n", "\n").removesuffix("\n") for name, source in self._sources.items()}
        return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _plain(self) -> PlainEncoder:
        return PlainEncoder(self._backend, self._special, secrets.token_hex(8))

    @cached_property
    def _finder(self) -> Backend:
        return control_finder(self._backend)

    @cached_property
    def _length_bound(self) -> LengthBound | None:
        vocab = self._backend.get_vocab(with_added_tokens=True)
        return length_bound(self._backend, map(self.token_bytes, vocab.values()))

    def _check_length(self, text: str, refuse_from: int | None) -> None:
        bound = self._length_bound
        # A character has at most four bytes, so most texts are short enough whatever they contain.
        if refuse_from is None or bound is None or len(text) * 4 < refuse_from * bound.max_bytes:
            return
        if (least := bound.least_tokens(_valid(text))) >= refuse_from:
            raise PromptTooLong(least)

    def _encode(self, text: str) -> list[int]:
        return encode_ids(self._backend, _valid(text))

    def _control_ids(self, ids: list[int]) -> list[int]:
        return [index for index in ids if index in self._control_set]

    def _id_of(self, name: str) -> int | None:
        text = self._config.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _framing(self) -> tuple[list[int], list[int]]:
        """Ids that tokenizer.json adds before and after a text (it overrides add_bos_token, as in transformers)."""
        framed = self._backend.encode("a", add_special_tokens=True)
        inner = [index for index, added in enumerate(framed.special_tokens_mask) if not added] or [len(framed.ids)]
        return framed.ids[: inner[0]], framed.ids[inner[-1] + 1 :]


def _valid(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PshareError(f"The text contains the lone surrogate {text[error.start]!r}; send valid Unicode.") from error
    return text
