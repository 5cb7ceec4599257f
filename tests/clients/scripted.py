"""A scripted stand-in for decode modules that choose freely: whole agents run on it over the real HTTP server."""

import json
from contextlib import contextmanager

import fake_server
from fake_engine import Echo
from serving_fakes import EOS, VOCAB
from tiny_tokenizer import write_tokenizer

from pshare_jax.text.tokenizer import Tokenizer

# Like SmolLM2's: no place for tools, any role.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURN = "<|im_start|>assistant\n"
ANSWER = "Rome has 3 millions, and 4 with one more."
TOTAL = {"city": "Rome", "total": 3}


def call(name, **arguments):
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


STEPS = [call("get_population", city="Rome"), call("add", a=3, b=1)]
SCRIPTS = {
    "text": [*STEPS, ANSWER],
    "together": [f"I look it up.\n{STEPS[0]}\n{STEPS[1]}", ANSWER],
    "json": [*STEPS, json.dumps(TOTAL)],
    "final_result": [*STEPS, call("final_result", **TOTAL)],
    "Total": [*STEPS, call("Total", **TOTAL)],
    "final_answer": [*STEPS, call("final_answer", answer=ANSWER)],
    "hand-off": [call("transfer_to_handed")],
    "handed": ["", *STEPS, ANSWER],
    "only json": [json.dumps(TOTAL)],
    "only fenced": [f"Here it is:\n```json\n{json.dumps(TOTAL)}\n```"],
    "only Total": [call("Total", **TOTAL)],
}
"""Task -> what it says in the first, second, ... turn of a chat, over and over."""


class Turns(Echo):
    """Says what its script has for the number of the assistant's turn."""

    def __init__(self, tokenizer, answers):
        self._turn = tokenizer.encode(TURN, add_special_tokens=False)
        self._answers = [[*tokenizer.encode(text, add_special_tokens=False), EOS] for text in answers]

    def next_id(self, context, made):
        prompt = list(context[: len(context) - made])
        width = len(self._turn)
        turns = sum(prompt[start : start + width] == self._turn for start in range(len(prompt) - width + 1))
        return self._answers[(turns - 1) % len(self._answers)][made]


@contextmanager
def serving(folder):
    """The address of a server with the tasks of `SCRIPTS`."""
    write_tokenizer(folder, "smollm", vocab_size=VOCAB)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    tokenizer = Tokenizer.from_folder(folder)
    scripts = {task: Turns(tokenizer, answers) for task, answers in SCRIPTS.items()}
    with fake_server.serving(tokenizer=tokenizer, scripts=scripts) as running:
        yield str(running.client.base_url)
