"""The texts inside a PNG: its text chunks, and NovelAI's copy in the lowest bits of the alpha channel.

Pictures come from anywhere: the format is PNG alone, Pillow's limits on size and on compressed text hold, and what is
hidden in the alpha channel may unpack to 4 MB at most.
"""

import json
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from sumizome.errors import DataError

__all__ = ["read_png_texts"]

_SIGNATURES = {b"stealth_pngcomp": True, b"stealth_pnginfo": False}
"""What the hidden text begins with, and whether it is gzipped."""
_LARGEST_TEXT = 4_000_000


def read_png_texts(path: Path) -> dict[str, str]:
    """Every named text of the picture. Hidden ones appear under the names that they have as chunks; chunks win.

    Raises: DataError for a file that is no readable PNG.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                image.load()
                assert isinstance(image, PngImageFile)
                texts = {name: str(text) for name, text in image.text.items()}
                alpha = np.asarray(image.getchannel("A")) if image.mode == "RGBA" else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{path}: cannot be read as a PNG picture ({error}); give one with its settings inside"
        ) from error
    return {**_hidden_texts(alpha), **texts} if alpha is not None else texts


def _hidden_texts(alpha: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> dict[str, str]:
    """Texts in the lowest bits of `alpha` [height, width], read column by column; none where nothing is hidden.

    A signature of 15 bytes, the length in bits as 4 bytes (big-endian), then the text. NovelAI's is a JSON object of
    all its chunks, A1111's extension writes the `parameters` alone.
    """
    bits = (alpha & 1).T.reshape(-1)
    head = np.packbits(bits[: 19 * 8]).tobytes()
    if head[:15] not in _SIGNATURES:
        return {}
    length = int.from_bytes(head[15:19], "big")
    payload = np.packbits(bits[19 * 8 : 19 * 8 + length]).tobytes()
    try:
        if _SIGNATURES[head[:15]]:
            unpacker = zlib.decompressobj(wbits=31)
            payload = unpacker.decompress(payload, _LARGEST_TEXT)
            if not unpacker.eof:
                return {}
        text = payload.decode("utf-8")
    except (zlib.error, UnicodeDecodeError):
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        return {"parameters": text}
    if not isinstance(found, dict):
        return {"parameters": text}
    return {str(name): value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
