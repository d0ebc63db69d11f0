"""A matrix as a small PNG whose opacity is the value, for the browser to enlarge.

The color is one; where a value is low the page shows through, so that the picture
suits a light page and a dark one.
"""

import base64
import struct
import zlib

import numpy as np

from ..calibrate.stats import Array

COLOR = (42, 120, 214)


def opacity_png(share_YX: Array) -> bytes:
    """An indexed PNG of a matrix of shares, 0 (nothing) to 1 (opaque); NaN is nothing.

    Args:
        share_YX: Row 0 is the top.
    """
    height, width = share_YX.shape
    clipped_YX = np.clip(np.nan_to_num(share_YX, nan=0.0), 0.0, 1.0)
    index_YX = np.rint(clipped_YX * 255).astype(np.uint8)
    # Each row starts with the number of its filter: none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), index_YX], axis=1)
    # 8 bits, color type 3 (palette); compression 0, filter 0, not interlaced.
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = (
        (b"IHDR", header),
        # Every entry is the one color; tRNS gives entry i the opacity i / 255.
        (b"PLTE", bytes(COLOR) * 256),
        (b"tRNS", bytes(range(256))),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


def data_uri(png: bytes) -> str:
    """The picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    # PNG, 5.3: the length is that of the data, the CRC is of type and data.
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check
