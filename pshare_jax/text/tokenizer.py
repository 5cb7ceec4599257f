"""Text and chats to token ids and back: the library's tokenizer, without transformers.

Model sources make it; the server, training and generation use it. Ids equal transformers' for the same files. Only control
tokens that a chat template itself writes become control ids; text inside messages stays text (control_tokens.py).
"""

import copy
import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_fitting import ChatFitting, FittedChat, check_shown
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.chat_template import ChatTemplate, checked_messages, free_characters, plain_data, until_mark
from pshare_jax.text.control_tokens import ControlFinder, ControlText, PieceEncoder, Placeholders, PlainEncoder, finding
from pshare_jax.text.detokenizer import Detokenizer, token_bytes_for
from pshare_jax.text.encoder import PLAIN, PromptTooLong
from pshare_jax.text.gguf_tokenizer import read_gguf
from pshare_jax.text.hf_files import SPECIAL_NAMES, read_folder, write_folder
from pshare_jax.text.length_bound import LengthBound, length_bound
from pshare_jax.text.native import decode, encode_offsets
from pshare_jax.text.template_traits import TemplateTraits, probe
from pshare_jax.text.tool_format import ToolFormat, as_shown, with_stand_ins


@dataclass(frozen=True)
class _Chat:
    """A chat as its template gets it; `kwargs` are the template's other variables.

    `markers` are the control tokens of our own text, by the characters that stand for them in it.
    """

    template: ChatTemplate
    fitted: FittedChat
    kwargs: dict[str, Any]
    markers: dict[str, str]

    @property
    def strings(self) -> list[Any]:
        """All that clients sent: messages, tools, values of kwargs."""
        return [self.fitted.messages, self.fitted.tools, list(self.kwargs.values())]

    def marked(self, text: str) -> str:
        """A rendering with the markers' texts."""
        return text.translate(str.maketrans(self.markers)) if self.markers else text


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
        self._clock: datetime | None = None
        self._compiled: dict[str, ChatTemplate] = {}
        self._probed: dict[str, TemplateTraits] = {}
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

    def at(self, clock: datetime) -> "Tokenizer":
        """The same tokenizer, whose chat templates tell this time instead of that of the rendering."""
        other = copy.copy(self)
        other._clock, other._compiled = clock, {}
        return other

    def with_template(self, source: str) -> "Tokenizer":
        """The same tokenizer with this chat template."""
        return Tokenizer(self._backend, self._config, {"default": source}, self.eos_ids)

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
        style: ChatStyle = PLAIN,
    ) -> list[int]:
        """The prompt's ids for a chat, as the model's template writes it.

        Without control text in messages, tools and kwargs the ids equal those of transformers' `apply_chat_template`, if
        the template shows the messages' roles, calls and tools, and the style asks for nothing else (chat_fitting.py).
        Control text in them is encoded as ordinary text.

        Raises:
            PromptTooLong: the rendered text's length shows that it has at least `refuse_from` tokens.
            PshareError: the model has no template, a role or part is unknown, the template refuses the messages or does
                not show one of them, or it would complete message text to a control token.
        """
        try:
            chat = self._fitted(messages, tools, template_kwargs, style)
            return self._encode_fitted(chat, add_generation_prompt, refuse_from)
        except RecursionError as error:
            raise _too_deep() from error

    def encode_turn(
        self,
        messages: Sequence[Mapping[str, Any]],
        answer: Mapping[str, Any],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        style: ChatStyle = PLAIN,
    ) -> tuple[list[int], list[int]]:
        """Ids of the prompt for `messages` as `encode_chat` gives it, and of what the template writes for `answer` after it.

        The second part runs to the end of the rendering: the answer, its end-of-turn token, often a line break. A token
        that would span the boundary is split there, since generation starts there. PshareError: as `encode_chat`, and if
        the template does not write the answer right after the prompt.
        """
        prompt = self.encode_chat(messages, tools=tools, template_kwargs=template_kwargs, style=style)
        try:
            chat = self._fitted([*messages, answer], tools, template_kwargs, style, num_last=1)
            ids = self._encode_fitted(chat, False, None)
            return prompt, ids[len(prompt) :] if ids[: len(prompt)] == prompt else self._encode_last(chat)
        except RecursionError as error:
            raise _too_deep() from error

    def turn_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        answer: Mapping[str, Any],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        style: ChatStyle = PLAIN,
    ) -> tuple[str, str]:
        """The texts whose ids `encode_turn` gives: the prompt, and the chat up to the answer. PshareError: as `encode_chat`."""
        prompt = self._fitted(messages, tools, template_kwargs, style)
        whole = self._fitted([*messages, answer], tools, template_kwargs, style, num_last=1)
        return self._rendered(prompt, prompt.strings, True), self._rendered(whole, whole.strings, False)

    def reads_variable(self, name: str, style: ChatStyle = PLAIN) -> bool:
        """Whether a chat template of this style reads a variable, such as one of `template_kwargs`."""
        return any(name in self._template(tools, style).variables for tools in (None, []))

    def encode_begun(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        refuse_from: int | None = None,
        style: ChatStyle = PLAIN,
    ) -> tuple[list[int], int | None]:
        """Ids of a chat that ends within its last message, an answer to go on with, and the index of its first id.

        The ids equal those of transformers' `continue_final_message`. An empty answer gives the prompt and None.
        PshareError: as `encode_chat`, and if the last message is no text of the assistant.
        """
        try:
            *before, last = checked_messages(messages)
            if last["role"] != "assistant" or last.get("tool_calls"):
                raise PshareError("The last message must be an assistant's text to be continued; send it last.")
            if not before:
                raise PshareError("An answer to be continued needs a message before it; send what it answers too.")
            options: dict[str, Any] = {"tools": tools, "template_kwargs": template_kwargs, "style": style}
            prompt = self.encode_chat(before, **options, refuse_from=refuse_from)
            if not last.get("content", "").strip():
                return prompt, None
            last.pop("prefix", None)
            (mark,) = free_characters([messages, tools, template_kwargs], 1)
            # The blank shows whether the template trims what it writes.
            marked = {**last, "content": f"{last['content']}{mark} "}
            chat = self._fitted([*before, marked], tools, template_kwargs, style, num_last=1)
            ids = self._encode_fitted(chat, False, refuse_from, lambda text: until_mark(text, mark))
        except RecursionError as error:
            raise _too_deep() from error
        pairs = zip(prompt, ids, strict=False)
        start = next((index for index, (one, other) in enumerate(pairs) if one != other), len(prompt))
        return (ids, start) if start < len(ids) else (prompt, None)

    def tool_format(self, style: ChatStyle = PLAIN) -> ToolFormat | None:
        """How answers of this style write calls: the style's own format, or else the template's.

        None if there is no template, or it writes calls in a way that no `ToolFormat` describes.
        """
        if style.tool_format is not None or not (style.template or {"default", "tool_use"} & self._sources.keys()):
            return style.tool_format
        return self._traits(self._template([], style)).default_format

    def reads_chats(self, style: ChatStyle = PLAIN) -> bool:
        """Whether prompts of this style are chats rather than texts."""
        return style.text_prompt is None and (style.template is not None or self.chat_template is not None)

    def encode_question(self, question: str, style: ChatStyle = PLAIN) -> list[int]:
        """Ids of a prompt that is one question: a user's message, or a text."""
        if self.reads_chats(style):
            return self.encode_chat([{"role": "user", "content": question}], style=style)
        return self.encode(style.text(question))

    def turn_ends(self, style: ChatStyle = PLAIN) -> frozenset[int]:
        """The control token with which the style's own template ends answers; none for the base's template, whose end tokens
        are the model's.

        Raises:
            PshareError: that end is text, which would be part of every answer.
        """
        if style.template is None:
            return frozenset()
        closing = self._traits(self._template(None, style)).closing
        ids = self._encode(closing)
        ends = self._control_ids(ids)[:1]
        if closing.strip() and not ends:
            raise PshareError(
                f"The chat template ends answers with {closing.strip()!r}, which is no control token of this base; write "
                "{{ eos_token }} there, or use the template plain."
            )
        return frozenset(ends)

    def _fitted(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any] | None,
        style: ChatStyle,
        num_last: int = 0,
    ) -> _Chat:
        """The checked chat in the style; its last `num_last` messages are an answer."""
        checked, plain_tools = checked_messages(messages), plain_data(tools)
        template = self._template(plain_tools, style)
        form, markers = self.tool_format(style), {}
        if form is not None and self._control.inside([form.start, form.end]):
            stand_ins = free_characters([checked, plain_tools, kwargs], len(self._special))
            markers = dict(zip(stand_ins, self._special.values(), strict=True))
            form = with_stand_ins(form, {text: char for char, text in markers.items()})
        own = style.tool_format and as_shown(style.tool_format, self._special.values())
        fitting = ChatFitting(self._traits(template), replace(style, tool_format=own), form)
        return _Chat(template, fitting.fit(checked, plain_tools, num_last), plain_data(kwargs or {}), markers)

    def _encode_last(self, chat: _Chat) -> list[int]:
        """Ids of what the template writes for the last message."""
        placeholders = self._control.placeholders(chat.strings, chat.template.source)
        messages, *others = placeholders.masked(chat.strings)
        before = self._rendered(chat, [messages[:-1], *others], True)
        text = self._rendered(chat, [messages, *others], False)
        if not text.startswith(before):
            raise PshareError("The chat template must write the answer right after its prompt, but does not.")
        text = chat.marked(text[len(before) :])
        return self._encode_masked(text, placeholders) if self._control.inside(chat.strings) else self._encode(text)

    def _encode_fitted(
        self, chat: _Chat, add_generation_prompt: bool, refuse_from: int | None, cut: Callable[[str], str] = str
    ) -> list[int]:
        """Ids of a chat's rendering, of which `cut` keeps the part before an end."""

        def rendered(strings: list[Any]) -> str:
            return self._rendered(chat, strings, add_generation_prompt)

        def finished(text: str) -> str:
            return chat.marked(cut(text))

        strings = chat.strings
        plain = rendered(strings)
        self._check_length(plain, refuse_from)
        check_shown(chat.fitted.parts, plain, lambda messages: rendered([messages, *strings[1:]]))
        placeholders = self._control.placeholders(strings, chat.template.source)
        disguised = finished(rendered(placeholders.disguised(strings, chat.template.words)))
        own = self._control_ids(index for _, index in self._finder.find(_valid(disguised)))
        if self._control.inside(strings):
            ids = self._encode_masked(finished(rendered(placeholders.masked(strings))), placeholders)
        else:
            ids = self._encode(finished(plain))
        if self._control_ids(ids) != own:
            raise PshareError("The chat template would turn text of the messages into control tokens; rephrase it.")
        return ids

    def _rendered(self, chat: _Chat, strings: list[Any], add_generation_prompt: bool) -> str:
        messages, tools, values = strings
        variables = {**self._variables, **dict(zip(chat.kwargs, values, strict=True))}
        return chat.template.render(messages, tools, add_generation_prompt, variables)

    def _traits(self, template: ChatTemplate) -> TemplateTraits:
        if template.source not in self._probed:
            self._probed[template.source] = probe(template, self._variables, self._special.values())
        return self._probed[template.source]

    def _encode_masked(self, text: str, placeholders: Placeholders) -> list[int]:
        encoding = encode_offsets(self._backend, _valid(text))
        tokens = zip(encoding.ids, encoding.offsets, strict=True)
        spans = [(start, end, index) for index, (start, end) in tokens if index in self._control_set]
        return self._plain.encode(text, spans, placeholders.restored)

    def _template(self, tools: list | None, style: ChatStyle = PLAIN) -> ChatTemplate:
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        source = style.template or self._sources.get(name)
        if source is None:
            raise PshareError("The model has no chat template; send a text prompt to /v1/completions instead.")
        if source not in self._compiled:
            self._compiled[source] = ChatTemplate(source, self._clock)
        return self._compiled[source]

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the chat templates; transformers loads the folder."""
        write_folder(Path(folder), self._backend, self._config, self._sources)

    @property
    def vocabulary(self) -> dict[str, int]:
        """All tokens, also added ones, and their ids."""
        return self._backend.get_vocab(with_added_tokens=True)

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

    @property
    def template_sources(self) -> list[str]:
        """The sources of all chat templates."""
        return list(self._sources.values())

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables that the tokenizer's files give to chat templates."""
        return dict(self._variables)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Any, ...]]:
        """Another process builds it again; its templates tell the time of the rendering."""
        return Tokenizer, (self._backend, self._config, self._sources, self.eos_ids)

    @cached_property
    def _plain(self) -> PlainEncoder:
        return PlainEncoder(self._backend, self._special, secrets.token_hex(8))

    @cached_property
    def _finding(self) -> Backend:
        return finding(self._backend)

    @cached_property
    def _finder(self) -> ControlFinder:
        return ControlFinder(self._finding)

    @cached_property
    def _pieces(self) -> PieceEncoder:
        return PieceEncoder(self._backend, ControlFinder(self._finding))

    @cached_property
    def _length_bound(self) -> LengthBound | None:
        return length_bound(self._backend, map(self.token_bytes, self.vocabulary.values()))

    def _check_length(self, text: str, refuse_from: int | None) -> None:
        bound = self._length_bound
        # A character has at most four bytes, so most texts are short enough whatever they contain.
        if refuse_from is None or bound is None or len(text) * 4 < refuse_from * bound.max_bytes:
            return
        if (least := bound.least_tokens(_valid(text))) >= refuse_from:
            raise PromptTooLong(least)

    def _encode(self, text: str) -> list[int]:
        return self._pieces.encode(_valid(text))

    def _control_ids(self, ids: Iterable[int]) -> list[int]:
        return [index for index in ids if index in self._control_set]

    def _id_of(self, name: str) -> int | None:
        text = self._config.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _framing(self) -> tuple[list[int], list[int]]:
        """Ids that tokenizer.json adds before and after a text (it overrides add_bos_token, as in transformers)."""
        framed = self._backend.encode("a", add_special_tokens=True)
        inner = [index for index, added in enumerate(framed.special_tokens_mask) if not added] or [len(framed.ids)]
        return framed.ids[: inner[0]], framed.ids[inner[-1] + 1 :]


def _too_deep() -> PshareError:
    return PshareError("The messages are nested too deeply; flatten them.")


def _valid(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PshareError(f"The text contains the lone surrogate {text[error.start]!r}; send valid Unicode.") from error
    return text
