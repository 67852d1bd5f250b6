"""Compressed bodies, as kombu inflates them in a worker: within a limit, or not at all."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from kombu import compression

UNKNOWN_COMPRESSION = "it is compressed in a way that is not supported: use gzip, bzip2 or lzma"


def inflate_within(limit: int) -> None:
    """Have kombu inflate a compressed body in this process only if it is at most `limit` bytes then; else it fails.

    Only what can be inflated with a limit is, which zstd and brotli cannot.
    """

    def bounded(new: Callable[[], Any]) -> Callable[[bytes], bytes]:
        def inflate(compressed: bytes) -> bytes:
            inflated: bytes = new().decompress(compressed, limit + 1)
            if len(inflated) > limit:
                raise ValueError(f"inflated, it has more than {limit:,} bytes")
            return inflated

        return inflate

    def refuse(_: bytes) -> bytes:
        raise ValueError(UNKNOWN_COMPRESSION)

    decoders = {
        "application/x-gzip": bounded(zlib.decompressobj),
        "application/x-bz2": bounded(bz2.BZ2Decompressor),
        "application/x-lzma": bounded(lzma.LZMADecompressor),
    }
    for content_type in {*compression.encoders(), *decoders}:
        encode, _ = compression.get_encoder(content_type)
        compression.register(encode, decoders.get(content_type, refuse), content_type)
