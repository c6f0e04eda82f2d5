"""Writing safetensors as a stream."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import FormatError
from .._checks import short
from .._files import PartFile
from .file import DTYPES

_CHUNK_BYTES = 1 << 24
_NAMES = {np.dtype(d).name: n for n, (_, d) in DTYPES.items() if d is not None and not n.startswith("F8")}
_NAMES |= {"uint8": "U8", "uint16": "U16"}


class SafetensorsWriter(PartFile):
    """A safetensors file written tensor by tensor, in constant memory, that appears under its name when it is whole.

    Data goes to ``PATH.part`` behind room left for the header, which is written last; an exception in the ``with`` block
    removes the file.

    Parameters
    ----------
    path : Path
    header_bytes : int
        Room for the header. What is not used is filled with spaces, as the format allows.
    """

    def __init__(self, path: Path, header_bytes: int) -> None:
        super().__init__(path)
        self._room = -(-header_bytes // 8) * 8
        self._header: dict[str, Any] = {}
        self._at = 0
        self._file.seek(8 + self._room)

    @property
    def nbytes(self) -> int:
        """Bytes of data so far."""
        return self._at

    @property
    def names(self) -> list[str]:
        """Tensors so far."""
        return list(self._header)

    def add(self, name: str, array: np.ndarray, dtype: str | None = None) -> None:
        """Appends a tensor; `dtype` is its safetensors name where the array's own does not tell ("BF16", "F8_E4M3")."""
        if name in self._header:
            raise FormatError(f"{self.path}: tensor {short(name)}: expected once, got twice")
        dtype = dtype or _NAMES[array.dtype.name]
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for at in range(0, flat.size, _CHUNK_BYTES):
            self._file.write(flat[at : at + _CHUNK_BYTES].data)
        end = self._at + flat.size
        self._header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [self._at, end]}
        self._at = end

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the header and gives the file its name."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)} | self._header
        text = json.dumps(header, separators=(",", ":")).encode()
        if len(text) > self._room:
            raise FormatError(f"{self.path}: header: expected at most {self._room} bytes, got {len(text)}")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        self.commit()
