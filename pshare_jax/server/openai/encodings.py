"""From a body's bytes as sent to JSON text: content encodings, and errors that name what else it may be."""

import json
import zlib

from pshare_jax.server.openai.schema import ApiError

BOM = b"\xef\xbb\xbf"
# Content-Encoding -> zlib's window bits; deflate is sent with zlib's header or, against the standard, without.
_WINDOW_BITS = {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}
_MAGIC = {
    b"\x1f\x8b": ("gzip data", "send the header Content-Encoding: gzip"),
    b"\x28\xb5\x2f\xfd": ("zstd data", "this server decodes gzip and deflate only; send it uncompressed"),
    b"\x78\x01": ("zlib data", "send the header Content-Encoding: deflate"),
    b"\x78\x9c": ("zlib data", "send the header Content-Encoding: deflate"),
    b"\x78\xda": ("zlib data", "send the header Content-Encoding: deflate"),
    b"PK\x03\x04": ("a zip archive", "send its content uncompressed"),
}


class DecodedTooLong(Exception):
    """The decoded body has more bytes than allowed."""


def check_headers(content_type: str, encoding: str) -> str:
    """The content encoding, "" for none.

    Raises:
        ApiError: 415, the content type, charset or encoding is not supported.
    """
    kind, _, parameters = content_type.partition(";")
    kind = kind.strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"The Content-Type must be application/json, not {kind or 'empty'}.")
    charset = parameters.lower().partition("charset=")[2].partition(";")[0].strip(' "')
    if charset.startswith(("utf-16", "utf-32", "utf16", "utf32")):
        raise ApiError(415, f"The charset {charset} is not supported; send the body in UTF-8.")
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return ""
    if encoding not in _WINDOW_BITS:
        message = f"The Content-Encoding {encoding[:40]!r} is not supported; send gzip or deflate, or no encoding."
        raise ApiError(415, message)
    return encoding


def decoded(raw: bytes, encoding: str, max_bytes: int) -> bytes:
    """The body without its content encoding; no more than `max_bytes` + 1 bytes are ever decoded.

    Raises:
        DecodedTooLong: more than `max_bytes`.
        ApiError: 400, the body does not have this encoding.
    """
    for bits in _WINDOW_BITS[encoding]:
        try:
            return _decompressed(raw, bits, max_bytes)
        except (zlib.error, EOFError):
            continue
    raise ApiError(400, f"The request body is not valid {encoding} data, as its Content-Encoding says.")


def _decompressed(raw: bytes, window_bits: int, max_bytes: int) -> bytes:
    whole = bytearray()
    # A gzip file may have several members.
    while raw or not whole:
        member = zlib.decompressobj(window_bits)
        whole += member.decompress(raw, max_bytes + 1 - len(whole))
        if len(whole) > max_bytes:
            raise DecodedTooLong
        if not member.eof:
            raise EOFError
        raw = member.unused_data
    return bytes(whole)


def json_text(raw: bytes) -> bytes:
    """The body as UTF-8 without a byte order mark.

    Raises:
        ApiError: 400, it is in another encoding, or compressed without saying so.
    """
    for magic, (name, advice) in _MAGIC.items():
        if raw.startswith(magic):
            raise ApiError(400, f"The request body is not JSON but looks like {name}; {advice}.")
    name = json.detect_encoding(raw).upper()
    if name.startswith(("UTF-16", "UTF-32")):
        raise ApiError(400, f"The request body looks like {name[:6]}; send it in UTF-8.")
    return raw.removeprefix(BOM)
