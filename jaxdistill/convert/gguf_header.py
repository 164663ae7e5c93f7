"""The front of a GGUF file: its metadata, and where each tensor lies.

Parsed here rather than by the `gguf` package, whose reader takes seconds on a real vocabulary and
answers a truncated file with whatever numpy raises first; that package's part is to dequantise.

Layout (version 2 and 3, little-endian): "GGUF", version, tensor count, metadata count; then
key/type/value entries; then name/dimensions/type/offset of each tensor; then, aligned, the data.
"""

import mmap
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL = 7


class TensorInfo(NamedTuple):
    """Where a tensor is: numpy's order of dimensions, ggml's type number, byte offset in file."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


class Header(NamedTuple):
    """Metadata by key and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: pathlib.Path) -> Header:
    """Read everything in front of the data.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not GGUF, another version, truncated or corrupt.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if start[:4] != _MAGIC:
            raise ValueError(
                f"{path}: this is not a GGUF file: it should start with {_MAGIC!r} but starts "
                f"with {start[:4]!r}"
            )
        version = int.from_bytes(start[4:], "little")
        if version not in _VERSIONS:
            raise ValueError(
                f"{path}: GGUF versions 2 and 3 (little-endian) are read here but this file says "
                f"version {version}; convert the model again with a current llama.cpp"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(path, data))


def _parse(cursor: "_Cursor") -> Header:
    cursor.position = 8
    tensor_count, metadata_count = cursor.unpack("<QQ")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.unpack("<I")[0])
    found: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        (dimensions,) = cursor.unpack("<I")
        if dimensions > 4 or name in found:
            raise cursor.corrupt(f"tensor {name!r} is listed twice or has {dimensions} dimensions")
        # GGUF lists the fastest-moving dimension first, numpy last.
        shape = cursor.unpack(f"<{dimensions}Q")[::-1]
        found[name] = TensorInfo(shape, *cursor.unpack("<IQ"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.corrupt(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: info._replace(offset=start + info.offset) for name, info in found.items()}
    return Header(metadata, tensors)


class _Cursor:
    """Reads forward and never past the end."""

    def __init__(self, path: pathlib.Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise ValueError(
                f"{self.path}: the GGUF file is truncated: its header asks for byte {end:,} and "
                f"it has {len(self.data):,}; fetch it again"
            )
        found = self.data[self.position : end]
        self.position = end
        return found

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        (length,) = self.unpack("<Q")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt("a name is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item_kind, count = self.unpack("<IQ")
            if item_kind == _STRING:
                return [self.string() for _ in range(count)]
            return self.scalars(item_kind, count)
        return self.scalars(kind, 1)[0]

    def scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise self.corrupt(f"there is no value type {kind}")
        dtype = _SCALARS[kind]
        found = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return (found != 0).tolist() if kind == _BOOL else found.tolist()

    def corrupt(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path}: the GGUF file is corrupt near byte {self.position:,} ({what}); fetch "
            "it again"
        )
