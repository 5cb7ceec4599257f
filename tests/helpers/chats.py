"""Chat messages and tiny tokenizers for the tests of chat templates."""

import json
from pathlib import Path

from tiny_tokenizer import GEMMA3_TEMPLATE, QWEN3_TEMPLATE, write_tokenizer

from pshare_jax.text.tokenizer import Tokenizer

# The rules of real templates for tools, in templates of our own.

# Qwen2.5, Hermes: tools in the system message, a default one, calls as <tool_call> with one JSON object each.
HERMES_TEMPLATE = """\
{%- set default = 'You are a model.' %}
{%- set lead = messages[0].content if messages[0].role == 'system' else default %}
{{- '<|im_start|>system\\n' + lead }}
{%- if tools %}
{{- '\\n\\n# Tools\\n<tools>' }}
{%- for tool in tools %}
{{- '\\n' + (tool | tojson) }}
{%- endfor %}
{{- '\\n</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) or (m.role == 'assistant' and not m.tool_calls) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant' + ('\\n' + m.content if m.content else '') }}
{%- for call in m.tool_calls %}
{%- set call = call.function or call %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Llama 3.1: tools in the first user message, one call a message and no text with it, contents of tools as JSON.
LLAMA31_TEMPLATE = """\
{{- bos_token }}
{%- set lead = '' %}
{%- if messages[0].role == 'system' %}
{%- set lead = messages[0].content | trim %}
{%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nKnowledge: 2023\\n\\n' + lead + '<|eot_id|>' }}
{%- if tools %}
{%- if not messages %}
{{- raise_exception('Tools need a first user message.') }}
{%- endif %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with {"name": ..., "parameters": ...}.\\n\\n' }}
{%- for tool in tools %}
{{- (tool | tojson(indent=4)) + '\\n\\n' }}
{%- endfor %}
{{- (messages[0].content | trim) + '<|eot_id|>' }}
{%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{%- if not (m.role == 'ipython' or m.role == 'tool' or m.tool_calls) %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + (m.content | trim) + '<|eot_id|>' }}
{%- elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}
{{- raise_exception('Only one call at a time.') }}
{%- endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- (call.arguments | tojson) + '}<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Mistral: a control token before a list of calls with ids of nine characters, no generation prompt.
MISTRAL_TEMPLATE = """\
{{- bos_token }}
{%- set asked = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}
{%- set asked.last = loop.index %}
{%- endfor %}
{%- set asked.seen = 0 %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- set asked.seen = asked.seen + 1 %}
{%- if asked.seen == asked.last and tools %}
{{- '[TOOLS] ' + (tools | tojson) }}
{%- endif %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}
{{- '<|python_tag|> [' }}
{%- for call in m.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}
{{- raise_exception('Tool call ids must have nine characters.') }}
{%- endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}
{{- ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[RESULT] ' + m.content + '[/RESULT]' }}
{%- elif m.role == 'system' and loop.first %}
{{- m.content }}
{%- else %}
{{- raise_exception('Only user, assistant, tool and a first system message are supported.') }}
{%- endif %}
{%- endfor %}
"""

# DeepSeek V3: arguments are concatenated, so they must be text.
DEEPSEEK_TEMPLATE = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '<U>' + m.content }}
{%- elif m.role == 'system' %}
{{- m.content }}
{%- elif m.role == 'tool' %}
{{- '<R>' + m.content + '</R>' }}
{%- elif m.tool_calls %}
{{- '<A>' + (m.content or '') }}
{%- for call in m.tool_calls %}
{{- '<C>' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```</C>' }}
{%- endfor %}
{{- eos_token }}
{%- else %}
{{- '<A>' + m.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<A>' }}
{%- endif %}
"""

# Qwen3-Coder: arguments are iterated, so they must be an object.
ITEMS_TEMPLATE = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}
{{- '<function=' + call.function.name + '>' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>' + value + '</parameter>' }}
{%- endfor %}
{{- '</function>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# SmolLM2: no tools, no calls, any role, a default system message.
PLAIN_TEMPLATE = """\
{%- for m in messages %}
{%- if loop.first and m['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are small.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TOOL_TEMPLATES = {
    "hermes": ("qwen3", HERMES_TEMPLATE),
    "llama31": ("llama", LLAMA31_TEMPLATE),
    "mistral": ("llama", MISTRAL_TEMPLATE),
    "deepseek": ("llama", DEEPSEEK_TEMPLATE),
    "items": ("smollm", ITEMS_TEMPLATE),
    "plain": ("smollm", PLAIN_TEMPLATE),
    "qwen3": ("qwen3", QWEN3_TEMPLATE),
    "gemma3": ("gemma3", GEMMA3_TEMPLATE),
}
"""Name -> the family whose tokenizer it goes with, and the template."""

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


def called(arguments, *, content=None, count: int = 1) -> dict:
    """An assistant's message that calls `weather` with these arguments."""
    calls = [{"id": f"callid{index:03}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
             for index in range(count)]  # fmt: skip
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(text: str, index: int = 0) -> dict:
    """A function's result."""
    return {"role": "tool", "tool_call_id": f"callid{index:03}", "content": text}


def tool_tokenizers(root: Path) -> dict[str, Path]:
    """Folders of the tokenizers of `TOOL_TEMPLATES`, which transformers loads too."""
    tokenizer_folders(root / "families")
    folders = {}
    for name, (family, template) in TOOL_TEMPLATES.items():
        (root / name).mkdir()
        tokenizer_with_template(root / "families", root / name, family, template)
        folders[name] = root / name
    return folders
