"""Files opened without trusting what they are, and written so that they appear under their name only when whole."""

import mmap
import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from ..errors import FormatError


class Closing(ABC):
    """What is closed at the end of a ``with`` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Lets go of what is open."""


def regular_size(path: Path) -> int:
    """Size of a regular file, which is not opened if it is anything else (a pipe would wait for ever)."""
    try:
        info = path.stat()
    except (OSError, ValueError) as exc:
        raise _unreadable(path, exc) from exc
    if not stat.S_ISREG(info.st_mode):
        raise FormatError(f"{path}: expected a regular file")
    return info.st_size


def map_file(path: Path, least_bytes: int, what: str) -> mmap.mmap:
    """A regular file of at least so many bytes, mapped; FormatError names it."""
    size = regular_size(path)
    if size < least_bytes:
        raise FormatError(f"{path}: expected a {what} file, got {size} bytes")
    try:
        with path.open("rb") as handle:
            return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as exc:
        raise _unreadable(path, exc) from exc


def unmap(data: mmap.mmap) -> None:
    """Lets go of a map; one of which arrays were given out is freed with the last of them."""
    try:
        data.close()
    except BufferError:
        return


def read_small(path: Path, limit: int) -> bytes:
    """A regular file of at most so many bytes."""
    size = regular_size(path)
    if size > limit:
        raise FormatError(f"{path}: expected at most {limit} bytes, got {size}")
    try:
        with path.open("rb") as handle:
            return handle.read(limit)
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _unreadable(path: Path, exc: Exception) -> FormatError:
    return FormatError(f"{path}: cannot be read: {getattr(exc, 'strerror', None) or exc}")


class PartFile(Closing):
    """A file written as ``PATH.part``: `commit` gives it its name, a ``with`` block that ends without that removes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part = path.with_name(path.name + ".part")
        self._whole = False
        self._file: BinaryIO = self._part.open("wb")

    def write(self, data: bytes) -> None:
        """Appends."""
        self._file.write(data)

    def close(self) -> None:
        """Removes what is not whole: interrupted, or the file could not be written."""
        if not self._whole:
            try:
                self._file.close()
            except OSError:  # what is still buffered cannot be written either
                pass
            self._part.unlink(missing_ok=True)

    def commit(self) -> None:
        """Writes all to the disk and gives the file its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self.path)
        self._whole = True
