"""Writing GGUF as a stream: another file's metadata with other tensor types."""

import math
import struct
from pathlib import Path

import numpy as np

from ...errors import FormatError
from .._files import PartFile
from ..dequant import GGML_TYPES
from .file import MAGIC, GGUFFile

_BY_NAME = {kind.name: (type_id, kind) for type_id, kind in GGML_TYPES.items()}
Info = tuple[str, tuple[int, ...], str]  # name, shape (row-major), type


def tensor_bytes(shape: tuple[int, ...], type_name: str, where: str) -> int:
    """Bytes of a tensor; FormatError where rows are no whole number of blocks."""
    kind = _BY_NAME[type_name][1]
    if shape[-1] % kind.block_size:
        raise FormatError(f"{where}: expected rows of a multiple of {kind.block_size} ({type_name}), got {shape[-1]}")
    return math.prod(shape) // kind.block_size * kind.block_bytes


class GGUFWriter(PartFile):
    """A GGUF version 3 file with the metadata of `source`, byte for byte, that appears under its name when it is whole.

    Tensors are added in the order of `infos`; an exception in the ``with`` block removes the file.
    """

    def __init__(self, path: Path, source: GGUFFile, infos: list[Info]) -> None:
        self._align = source.alignment
        self._sizes = [tensor_bytes(shape, kind, name) for name, shape, kind in infos]
        head = [MAGIC, struct.pack("<IQQ", 3, len(infos), len(source.metadata)), source.raw_metadata()]
        offset = 0
        for (name, shape, kind), size in zip(infos, self._sizes, strict=True):
            raw = name.encode()
            head.append(struct.pack("<Q", len(raw)) + raw + struct.pack("<I", len(shape)))
            head.append(struct.pack(f"<{len(shape)}QIQ", *reversed(shape), _BY_NAME[kind][0], offset))
            offset += size + -size % self._align
        self._added = 0
        super().__init__(path)
        self._file.write(b"".join(head))
        self._pad()

    def _pad(self) -> None:
        self._file.write(b"\0" * (-self._file.tell() % self._align))

    def add(self, rows: np.ndarray) -> None:
        """Appends the next tensor's bytes."""
        if rows.nbytes != self._sizes[self._added]:
            raise ValueError(f"rows: expected {self._sizes[self._added]} bytes, got {rows.nbytes}")
        self._file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        self._pad()
        self._added += 1

    def finish(self) -> None:
        """Gives the file its name."""
        if self._added != len(self._sizes):
            raise ValueError(f"tensors: expected {len(self._sizes)}, got {self._added}")
        self.commit()
