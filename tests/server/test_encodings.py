"""Bodies that are compressed, or not in UTF-8 (case N2-04)."""

import gzip
import json
import time
import zlib

import pytest
from fake_server import PATHS, error_of, serving

pytestmark = pytest.mark.host
BODY = json.dumps({"model": "abc", "prompt": "pé"}, ensure_ascii=False)
MAX_BYTES = 100_000
RAW = zlib.compressobj(wbits=-15)
COMPRESSED = {
    "gzip": [gzip.compress(BODY.encode()), gzip.compress(BODY[:9].encode()) + gzip.compress(BODY[9:].encode())],
    "x-gzip": [gzip.compress(BODY.encode())],
    "deflate": [zlib.compress(BODY.encode()), RAW.compress(BODY.encode()) + RAW.flush()],
    "GZIP": [gzip.compress(BODY.encode())],
    "identity": [BODY.encode()],
}
ZSTD = b"\x28\xb5\x2f\xfd\x04\x00"


@pytest.fixture(scope="module")
def server():
    with serving(max_body_bytes=MAX_BYTES) as running:
        yield running


def send(server, content, path=PATHS[0], content_type="application/json", encoding=None):
    headers = {"content-type": content_type} | ({"content-encoding": encoding} if encoding else {})
    return server.client.post(path, content=content, headers=headers)


@pytest.mark.parametrize("encoding", COMPRESSED)
def test_compressed_bodies_are_decoded(server, encoding):
    for content in COMPRESSED[encoding]:
        assert send(server, content, encoding=encoding).json()["choices"][0]["text"] == "ABCDEFGH"
    assert send(server, gzip.compress(b'{"prompt": "pp"}'), "/tokenize", encoding="gzip").json()["count"] == 2


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, deflate", "compress", "x" * 1000])
def test_other_encodings_are_named(server, encoding):
    message = error_of(send(server, b"{}", encoding=encoding), 415)["message"]
    assert encoding[:40] in message
    assert "gzip" in message
    assert "deflate" in message


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_decoded_bodies_have_the_limit_of_plain_bodies(server, encoding):
    """A bomb, 90 MB in 90 kB; and the sizes around the limit."""
    compress = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    bomb = compress(b"x" * 90_000_000)
    assert len(bomb) < MAX_BYTES
    began = time.monotonic()
    error_of(send(server, bomb, encoding=encoding), 413)
    assert time.monotonic() - began < 1
    for size, status in ((MAX_BYTES, 200), (MAX_BYTES + 1, 413)):
        content = BODY.encode() + b" " * (size - len(BODY.encode()))
        assert send(server, compress(content), encoding=encoding).status_code == status


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_bodies_that_are_not_what_they_say(server, encoding):
    for content in (b"", b"{}", BODY.encode(), gzip.compress(BODY.encode())[:-9], b"\x1f\x8b"):
        assert encoding in error_of(send(server, content, encoding=encoding), 400)["message"]


def test_a_byte_order_mark_is_accepted(server):
    assert send(server, BODY.encode("utf-8-sig")).status_code == 200
    assert send(server, gzip.compress(BODY.encode("utf-8-sig")), encoding="gzip").status_code == 200


@pytest.mark.parametrize("name", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_other_unicode_encodings_are_named(server, name):
    content = BODY.encode(name)
    assert name[:6].upper() in error_of(send(server, content), 400)["message"]
    declared = error_of(send(server, content, content_type=f'application/json; charset="{name.upper()}"'), 415)
    assert name in declared["message"]


@pytest.mark.parametrize("charset", ["utf-8", "UTF8", '"utf-8"'])
def test_the_right_charset_may_be_declared(server, charset):
    assert send(server, BODY.encode(), content_type=f"application/json; charset={charset}").status_code == 200


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (gzip.compress(BODY.encode(), mtime=0), "Content-Encoding: gzip"),
        (zlib.compress(BODY.encode()), "Content-Encoding: deflate"),
        (ZSTD, "zstd"),
        (b"PK\x03\x04rest", "zip archive"),
    ],
    ids=["gzip", "zlib", "zstd", "zip"],
)
def test_undeclared_compression_is_recognised(server, content, name):
    assert name in error_of(send(server, content), 400)["message"]
