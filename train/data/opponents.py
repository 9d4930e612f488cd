"""What a model of text is compared with: n-gram models and compressors that have training text, on the same bytes.

    KN-n    Kneser-Ney of order n (`kneser_ney.py`): of each held-out byte, after the bytes before it in its document
    xz      8 (size(training text + held-out bytes) - size(training text)) bits; LZMA2, preset 9e, a window over it all
    zstd    8 size(held-out bytes) bits, level 22, training text as dictionary; where `zstandard` is installed

Bits are per byte of those that the model is scored on (`held_out`), and of the clean ones among them (`clean`). An
n-gram model keeps its counts and has every byte before as context, clean or not, as the model has. A compressor gets
the bytes scored laid end to end: it knows nothing of what is left out between them, and learns from each as it goes.

Training text is at most MOST bytes, the first: of a larger corpus the documents at its beginning.
"""

import hashlib
import json
import lzma
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .corpus import AnyDocument
from .kneser_ney import BYTES, kneser_ney
from .mapped import cached
from .rows import Stream
from .scored import Scored

try:
    import zstandard
except ModuleNotFoundError:
    zstandard = None  # type: ignore[assignment]

MOST = 1 << 25
ORDERS = (3, 5, 7)
FILE = "bits.json"
Bits = dict[str, dict[str, float]]  # opponent -> held_out, clean


def training_text(documents: Sequence[AnyDocument]) -> np.ndarray:
    """Documents from the first on, as long as they come to MOST bytes, at least one: a stream of bytes."""
    chosen: list[AnyDocument] = []
    size = 0
    for document in documents:
        size += document.size
        if chosen and size > MOST:
            break
        chosen.append(document)
    return Stream(chosen, 1).tokens


def n_grams(train: np.ndarray, scored: Scored, orders: Sequence[int]) -> dict[int, np.ndarray]:
    """Bits of each scored byte, by order."""
    found = kneser_ney(train, scored.stream, orders)
    return {order: bits[scored.places] for order, bits in found.items()}


def opponents(train: np.ndarray, scored: Scored, clean: np.ndarray) -> Bits:
    """Bits per byte of each opponent, from the cache, or found first and put there.

    Args:
        train: the stream of bytes that they are given (`training_text`, `seen`).
        clean: bool [targets of `scored`]; without a clean one there is no such score.
    """
    sha = hashlib.sha256()
    for array in (train, scored.stream, scored.places, clean):
        sha.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    who = f"KN {ORDERS}, xz 9e, zstd 22 {zstandard.ZSTD_VERSION if zstandard else None}"

    def write(folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(_find(train, scored, clean)), "utf-8")

    folder = cached("opponents", {"opponents": who, "text": sha.hexdigest()}, write)
    return json.loads((folder / FILE).read_text("utf-8"))


def _find(train: np.ndarray, scored: Scored, clean: np.ndarray) -> Bits:
    """Side by side: compressors, and numpy's long calls, leave the interpreter to others."""
    parts = {"held_out": np.ones(scored.bytes, bool), "clean": np.repeat(clean, scored.widths)}
    parts = {name: part for name, part in parts.items() if part.any()}
    prefix, text = _bytes(train), scored.stream[scored.places]
    texts = [_bytes(text[part]) for part in parts.values()]
    with ThreadPoolExecutor() as pool:
        sizes = [pool.submit(_xz, prefix + text, len(prefix + texts[0])) for text in (b"", *texts)]
        zstd = pool.submit(_zstd, prefix, texts) if zstandard else None
        grams = n_grams(train, scored, ORDERS)
        before, *behind = [size.result() for size in sizes]
    found = {f"KN-{order}": [float(bits[part].mean()) for part in parts.values()] for order, bits in grams.items()}
    found["xz"] = [8 * (size - before) / len(text) for size, text in zip(behind, texts)]
    if zstd:
        found["zstd"] = [8 * size / len(text) for size, text in zip(zstd.result(), texts)]
    return {name: dict(zip(parts, bits)) for name, bits in found.items()}


def _bytes(stream: np.ndarray) -> bytes:
    """Without what stands between documents."""
    return stream[stream < BYTES].astype(np.uint8).tobytes()


def _xz(text: bytes, window: int) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(window, 4096)}]
    return len(lzma.compress(text, lzma.FORMAT_RAW, filters=filters))


def _zstd(prefix: bytes, texts: list[bytes]) -> list[int]:
    """What a reader of the sizes would need no more: neither checksum nor length."""
    window = max(10, len(prefix + texts[0]).bit_length())
    plain = {"write_checksum": False, "write_content_size": False, "write_dict_id": False}
    settings = zstandard.ZstdCompressionParameters.from_level(22, window_log=window, dict_size=len(prefix), **plain)
    known = zstandard.ZstdCompressionDict(prefix, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    compressor = zstandard.ZstdCompressor(dict_data=known, compression_params=settings)
    return [len(compressor.compress(text)) for text in texts]
