"""Quantised GGUF tensors equal the results of decoders written here from the format's description."""

import gguf
import numpy as np
import pytest

from pshare_jax.weights.gguf import GGUFFile

pytestmark = pytest.mark.host


def half(block, at):
    return float(np.frombuffer(bytes(block[at : at + 2]), np.float16)[0])


def nibbles(packed):
    """The low halves of all bytes, then the high halves."""
    return [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]


def decode_q4_0(block):
    return [half(block, 0) * (q - 8) for q in nibbles(block[2:18])]


def decode_q4_1(block):
    return [half(block, 0) * q + half(block, 2) for q in nibbles(block[4:20])]


def decode_q5_0(block):
    fifth = int.from_bytes(bytes(block[2:6]), "little")
    return [half(block, 0) * ((q | (fifth >> i & 1) << 4) - 16) for i, q in enumerate(nibbles(block[6:22]))]


def decode_q8_0(block):
    return [half(block, 0) * int(np.int8(np.uint8(q))) for q in block[2:34]]


def decode_q4_k(block):
    """8 sub-blocks of 32; 6-bit scales and minima packed into 12 bytes."""
    d, dmin, packed, quants = half(block, 0), half(block, 2), block[4:16], block[16:144]
    out = []
    for sub in range(8):
        if sub < 4:
            scale, minimum = packed[sub] & 63, packed[sub + 4] & 63
        else:
            scale = packed[sub + 4] & 15 | (packed[sub - 4] >> 6) << 4
            minimum = packed[sub + 4] >> 4 | (packed[sub] >> 6) << 4
        group = quants[32 * (sub // 2) : 32 * (sub // 2) + 32]
        out += [d * scale * (byte >> 4 if sub % 2 else byte & 15) - dmin * minimum for byte in group]
    return out


def decode_q6_k(block):
    """16 sub-blocks of 16 with signed 8-bit scales; 4 low bits in ql, 2 high bits in qh, in two halves of 128."""
    low, high, scales, d = block[:128], block[128:192], block[192:208], half(block, 208)
    out = []
    for index in range(256):
        part, within = divmod(index, 128)
        quarter, lane = divmod(within, 32)
        byte = low[64 * part + 32 * (quarter % 2) + lane]
        bits = (byte >> 4 if quarter >= 2 else byte & 15) | (high[32 * part + lane] >> 2 * quarter & 3) << 4
        out.append(d * int(np.int8(np.uint8(scales[index // 16]))) * (bits - 32))
    return out


DECODERS = {
    "Q4_0": (decode_q4_0, (0,)),
    "Q4_1": (decode_q4_1, (0, 2)),
    "Q5_0": (decode_q5_0, (0,)),
    "Q8_0": (decode_q8_0, (0,)),
    "Q4_K": (decode_q4_k, (0, 2)),
    "Q6_K": (decode_q6_k, (208,)),
}


def random_rows(kind, rows, rng):
    """Random blocks with finite half-precision numbers."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * 512 // block_size, block_bytes), dtype=np.uint8)
    for at in DECODERS[kind.name][1]:
        halves = rng.uniform(-0.1, 0.1, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks


@pytest.mark.parametrize("name", DECODERS)
def test_random_blocks_are_decoded(name, write_embedding, monkeypatch):
    kind = gguf.GGMLQuantizationType[name]
    blocks = random_rows(kind, 5, np.random.default_rng(0))
    path = write_embedding(blocks.reshape(5, -1), kind)
    expected = np.concatenate([DECODERS[name][0]([int(b) for b in block]) for block in blocks]).reshape(5, 512)
    # Two rows at a time, so that the last is read alone.
    monkeypatch.setattr("pshare_jax.weights.gguf._CHUNK_BYTES", 2 * 512 * 4)
    read = GGUFFile(path).read("model.embed_tokens.weight")
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "error"), [("Q4_0", 0.3), ("Q4_1", 0.3), ("Q5_0", 0.16), ("Q8_0", 0.02)])
def test_quantised_by_the_package(name, error, write_embedding):
    values = np.random.default_rng(0).standard_normal((7, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    packed = gguf.quants.quantize(values, kind)
    path = write_embedding(packed, kind)
    checkpoint = GGUFFile(path)
    assert checkpoint.shape("model.embed_tokens.weight") == (7, 512)
    assert checkpoint.config["vocab_size"] == 7
    np.testing.assert_allclose(checkpoint.read("model.embed_tokens.weight"), values, rtol=0, atol=error)
