"""Checks of single request fields, and the table of fields that are not supported.

schema.py and the bodies of the other endpoints use them. Each check takes the JSON value and returns its normal form; its
ValueError starts with the field's name and is shown to the client.
"""

import json
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any

MAX_STOPS = 64
MAX_NAME = 128

# Fields that would change the output, each with the values that do not. (0 == False, but types must match.)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "prompt_logprobs": (),
    "length_penalty": (1, 1.0),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "truncate_prompt_tokens": (),
    "guided_whitespace_pattern": (),
    "response_start": (),
}


def check_neutral(data: dict[str, Any], offered: Collection[str]) -> None:
    """Refuses fields of `NEUTRAL` with any other value, unless the endpoint supports the field (`offered`)."""
    for name, value in data.items():
        if name not in NEUTRAL or name in offered or value is None:
            continue
        if not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]):
            neutral = "".join(f" or set it to {json.dumps(value)}" for value in NEUTRAL[name][:1])
            raise ValueError(f"{name} is not supported by this server; omit it{neutral}.")


def check_stop(value: Any) -> list[str]:
    """A string or a list of up to `MAX_STOPS` strings; nulls in the list are ignored."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise ValueError("stop must be a string or a list of strings.")
    stops = [stop for stop in stops if stop is not None]
    if not all(isinstance(stop, str) for stop in stops):
        raise ValueError("stop must be a string or a list of strings.")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop has {len(stops)} entries; at most {MAX_STOPS} are allowed.")
    if "" in stops:
        raise ValueError("stop must not contain an empty string.")
    return stops


def check_stream_options(value: Any) -> dict[str, Any]:
    """An object of booleans; null is false, unknown keys are ignored."""
    if not isinstance(value, dict):
        raise ValueError("stream_options must be an object.")
    for name in ("include_usage", "continuous_usage_stats"):
        if not isinstance(value.get(name, False), bool | None):
            raise ValueError(f"stream_options.{name} must be true or false.")
    return value


def check_task_name(value: Any) -> str:
    """The name of a task that a client adds: one line of printable text."""
    if not isinstance(value, str):
        raise ValueError("lora_name must be a string.")
    if not value.strip() or len(value) > MAX_NAME:
        raise ValueError(f"lora_name must have 1 to {MAX_NAME} characters and not only whitespace.")
    if any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in value):
        raise ValueError("lora_name must not contain control characters or line breaks.")
    return value


def check_prompt(value: Any) -> Any:
    """A string, token ids, or a list of either."""
    message = "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids."
    several = isinstance(value, list) and value and isinstance(value[0], str | list)
    kinds = set()
    for prompt in value if several else [value]:
        if isinstance(prompt, list):
            if not all(type(item) is int for item in prompt):
                raise ValueError(message)
        elif not isinstance(prompt, str):
            raise ValueError(message)
        kinds.add(type(prompt))
    if len(kinds) > 1:
        raise ValueError(message)
    return value


def check_logit_bias(value: Any) -> dict[int, float]:
    """Token ids (strings in JSON) to numbers from -100 to 100."""
    if not isinstance(value, dict):
        raise ValueError("logit_bias must be an object that maps token ids to numbers.")
    biases = {}
    for name, bias in value.items():
        if not name.isascii() or not name.isdigit() or len(name) > 10:
            raise ValueError(f"logit_bias has the key {name[:40]!r}, which is not a token id.")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"logit_bias of token {name} must be a number from -100 to 100.")
        biases[int(name)] = float(bias)
    return biases


def check_messages(value: Any) -> list[dict[str, Any]]:
    """Objects with a role and content; the tokenizer checks roles and content parts."""
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list with at least one message.")
    for i, message in enumerate(value):
        _check_message(f"messages.{i}", message)
    return value


def continues(messages: Sequence[Mapping[str, Any]], asked: bool, prompted: bool) -> bool:
    """Whether the answer goes on with the last message: `asked` by continue_final_message, or by the message's `prefix`.

    `prompted`: add_generation_prompt was sent as true, which begins a new message.
    """
    last = messages[-1]
    begun = asked or (last.get("role") == "assistant" and last.get("prefix") is True)
    if begun and prompted:
        raise ValueError(
            "add_generation_prompt begins a new message, which contradicts continue_final_message; send only one as true."
        )
    return begun


def _check_message(name: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"{name} must be an object with role and content.")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"{name}.tool_calls must be a list of objects.")
    if not isinstance(message.get("function_call"), dict | None):
        raise ValueError(f"{name}.function_call must be an object.")
    if not isinstance(message.get("content"), str | list | None):
        raise ValueError(f"{name}.content must be a string or a list of parts.")
    if message.get("content") is None and message.get("role") != "assistant":
        raise ValueError(f"{name}.content is missing; send a string or a list of parts.")
