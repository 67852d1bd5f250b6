"""A limit on the size to which kombu inflates the compressed body of a message."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from kombu import compression

UNKNOWN_COMPRESSION = "it is compressed in a way that is not supported: use gzip, bzip2 or lzma"


def inflate_within(limit: int) -> None:
    """Make kombu, in this process, refuse a compressed body that inflates to more than `limit` bytes.

    It refuses any compression that cannot be inflated with a limit, such as zstd and brotli.
    """

    def bounded(new: Callable[[], Any]) -> Callable[[bytes], bytes]:
        def inflate(compressed: bytes) -> bytes:
            inflated: bytes = new().decompress(compressed, limit + 1)
            if len(inflated) > limit:
                raise ValueError(f"it has more than {limit:,} bytes when it is decompressed")
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
