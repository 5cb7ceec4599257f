"""Stand-ins for the model side: prefill and decode modules that follow a script, and a tokenizer of bytes.

With them the engine's walk, the stop rules and the HTTP face are tested in milliseconds, and any output can be forced.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from pshare_jax.errors import PshareError
from pshare_jax.serving.engine import DecodeSide, Engine, PrefillSide

VOCAB = 260
EOS, EOT = 257, 258


@dataclass(frozen=True)
class FakeKV:
    """The token ids it stands for; `layers` may hold arrays that say whether they are ready."""

    ids: tuple[int, ...] = ()
    layers: tuple = ()

    @property
    def nbytes(self):
        return 10 * len(self.ids)


class Gate:
    """An "array" that is ready when the test says so."""

    def __init__(self, ready=False):
        self.ready = ready

    def is_ready(self):
        return self.ready

    def block_until_ready(self):
        return self


class FakePrefill:
    def __init__(self):
        self.chunks = []
        self.fail_on: int | None = None

    def prefill(self, tokens, kv=None):
        ids = tuple(int(t) for t in tokens[0])
        if self.fail_on is not None and self.fail_on in ids:
            raise RuntimeError("made to fail")
        self.chunks.append(ids)
        return FakeKV((kv.ids if kv else ()) + ids)


class FakeDecode:
    """Says `scripts[task]` after any prompt: the answer's next id is found by how many ids follow the prompt."""

    def __init__(self, scripts):
        self.scripts = scripts
        self.gates = {}
        self.inputs = []
        self.fail_at: int | None = None
        self.prompt_len = 0

    def place(self, kv):
        self.prompt_len = len(kv.ids)
        return replace(kv, layers=self.gates.get(kv.ids, ()))

    def decode(self, task, tokens, kv, *, donate=False):
        token = int(tokens[0][0])
        kv = replace(kv, ids=(*kv.ids, token), layers=())
        made = len(kv.ids) - self.prompt_len - 1
        self.inputs.append((task, token))
        if self.fail_at is not None and made == self.fail_at:
            raise RuntimeError("made to fail")
        script = self.scripts[task]
        logits = np.zeros((1, 1, VOCAB), np.float32)
        logits[0, 0, script[made % len(script)]] = 99.0
        return jnp.asarray(logits), kv


class ByteTokenizer:
    """Ids 0..255 are bytes, the rest control tokens; templates join contents with newlines."""

    vocab_size = VOCAB

    def encode(self, text, *, add_special_tokens=True, allow_special=True):
        return list(text.encode())

    def encode_chat(self, messages, *, tools=None, add_generation_prompt=True, template_kwargs=None):
        if messages[0]["role"] == "assistant":
            raise PshareError("The chat template refuses these messages: roles must alternate.")
        extra = f"{len(tools)} tools\n" if tools else ""
        return list((extra + "\n".join(message["content"] or "" for message in messages)).encode())

    def detokenizer(self):
        return ByteDetokenizer()


class ByteDetokenizer:
    def __init__(self):
        self.held = b""

    def push(self, token_id):
        if token_id > 255:
            return ""
        self.held += bytes([token_id])
        try:
            text = self.held.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            text = self.held.decode(errors="replace")
        self.held = b""
        return text

    def flush(self):
        text, self.held = self.held.decode(errors="replace"), b""
        return text


def make_engine(scripts, *, num_prefill=1, devices=((0,), (1,)), max_requests=256):
    """An engine over fakes, with every prefill worker on devices[0] and one decode worker on devices[1]."""
    prefill = [FakePrefill() for _ in range(num_prefill)]
    decode = FakeDecode(scripts)
    engine = Engine(
        [PrefillSide(module, devices[0]) for module in prefill],
        [DecodeSide(decode, devices[1], list(scripts))],
        ByteTokenizer().detokenizer,
        max_requests,
    )
    return engine, prefill, decode
