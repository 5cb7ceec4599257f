"""What the data tests share: tokenizers by family, conversations, samples without a tokenizer."""

import json
import os
import shutil
import signal
import tempfile
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
from tiny_tokenizer import write_tokenizer

from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.data.epochs import Epochs
from pshare_jax.training.data.prepare import SampleSet
from pshare_jax.training.data.samples import Limits, Sample
from pshare_jax.training.data.store import SampleStore, write_samples

FAMILIES = ("llama", "smollm", "qwen3", "gemma3")
NO_LIMITS = Limits(100_000)


def tokenizers(root: Path) -> dict[str, Tokenizer]:
    for family in FAMILIES:
        write_tokenizer(root / family, family, vocab_size=320)
    return {family: Tokenizer.from_folder(root / family) for family in FAMILIES}


def with_template(root: Path, tmp_path: Path, family: str, template: str | None, **config) -> Tokenizer:
    """A family's tokenizer under another chat template."""
    content = json.loads((root / family / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((root / family / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**content, "chat_template": template, **config}))
    return Tokenizer.from_folder(tmp_path)


def chat(*contents: str, system: str | None = None) -> list[dict]:
    """user, assistant, user, ... with the given contents."""
    roles = ["user", "assistant"] * len(contents)
    lead = [] if system is None else [{"role": "system", "content": system}]
    return lead + [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def write_jsonl(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def random_samples(seed: int, count: int, longest: int = 40) -> list[Sample]:
    """Samples of random ids with one to four turns."""
    rng = np.random.default_rng(seed)
    samples = []
    for line in range(1, count + 1):
        turns, at = [], 0
        for _ in range(int(rng.integers(1, 5))):
            start = at + 1 + int(rng.integers(0, longest // 4))
            at = start + 1 + int(rng.integers(0, longest // 8))
            turns.append((start, at))
        samples.append(Sample(tuple(rng.integers(1, 1000, at).tolist()), tuple(turns), f"source{line % 2}", line))
    return samples


def sample_set(*groups: list[Sample], weights: tuple[float, ...] | None = None) -> SampleSet:
    """A set with one source for each group."""
    flat = [sample for group in groups for sample in group]
    ends = np.cumsum([0, *map(len, groups)])
    members = tuple(np.arange(a, b) for a, b in pairwise(ends))
    folder = Path(tempfile.mkdtemp(prefix="samples-"))
    write_samples(folder, enumerate(flat))
    found = SampleSet(SampleStore(folder), members, weights or (1.0,) * len(groups))
    weakref.finalize(found.store, shutil.rmtree, folder, ignore_errors=True)
    return found


class WatchedEpochs(Epochs):
    """Says from inside the workers whether JAX was started there; dies on command."""

    folder: Path

    def batch(self, epoch, number):
        from jax._src import xla_bridge

        (self.folder / f"{os.getpid()} {xla_bridge.backends_are_initialized()}").touch()
        if (self.folder / "die").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(epoch, number)
