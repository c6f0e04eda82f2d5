"""The values of a GGUF file, and a position in it from which they are read one by one."""

import mmap
import struct
from pathlib import Path
from typing import Any

from ...errors import FormatError

MAX_STEPS = 1 << 24  # strings and nested arrays stepped over one by one: about 2 s

STRING, ARRAY = 8, 9
#: Value types of fixed size: name, struct format, numpy dtype.
SCALARS: dict[int, tuple[str, struct.Struct, str]] = {
    0: ("uint8", struct.Struct("<B"), "<u1"),
    1: ("int8", struct.Struct("<b"), "<i1"),
    2: ("uint16", struct.Struct("<H"), "<u2"),
    3: ("int16", struct.Struct("<h"), "<i2"),
    4: ("uint32", struct.Struct("<I"), "<u4"),
    5: ("int32", struct.Struct("<i"), "<i4"),
    6: ("float32", struct.Struct("<f"), "<f4"),
    7: ("bool", struct.Struct("<B"), "<u1"),
    10: ("uint64", struct.Struct("<Q"), "<u8"),
    11: ("int64", struct.Struct("<q"), "<i8"),
    12: ("float64", struct.Struct("<d"), "<f8"),
}
VALUE_NAMES = {STRING: "string", ARRAY: "array"} | {i: s[0] for i, s in SCALARS.items()}
U32, U64 = SCALARS[4][1], SCALARS[10][1]


class Cursor:
    """A position in the file; every step is checked against its end."""

    def __init__(self, path: Path, data: mmap.mmap, at: int = 0) -> None:
        self.path, self.data, self.at, self.size, self.steps = path, data, at, len(data), 0

    def _truncated(self, where: str, wanted: int) -> FormatError:
        left = max(self.size - self.at, 0)
        return FormatError(
            f"{self.path}: {where}: expected {wanted} more bytes at offset {self.at}, got {left} (truncated file?)"
        )

    def take(self, size: int, where: str) -> bytes:
        """Bytes, stepped over."""
        if size > self.size - self.at:
            raise self._truncated(where, size)
        start, self.at = self.at, self.at + size
        return self.data[start : self.at]

    def unpack(self, form: struct.Struct, where: str) -> Any:
        """One value, stepped over."""
        if form.size > self.size - self.at:
            raise self._truncated(where, form.size)
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def u32(self, where: str) -> int:
        """uint32."""
        value: int = self.unpack(U32, where)
        return value

    def u64(self, where: str) -> int:
        """uint64."""
        value: int = self.unpack(U64, where)
        return value

    def count(self, where: str, least_bytes: int, limit: int, look_ahead: int = 0) -> int:
        """A count of things of at least `least_bytes` each, which must fit in what is left of the file."""
        value = self.u64(where)
        room = max(self.size - self.at - look_ahead, 0) // least_bytes
        if value > min(room, limit):
            raise FormatError(
                f"{self.path}: {where}: expected at most {min(room, limit)} (what the file has room for), got {value}"
            )
        return value

    def string(self, where: str) -> tuple[int, int]:
        """Start and length of a string, stepped over."""
        length = self.u64(f"{where}: string length")
        if length > self.size - self.at:
            raise self._truncated(where, length)
        start, self.at = self.at, self.at + length
        return start, length

    def text(self, where: str, limit: int) -> str:
        """A name: not empty, of at most `limit` bytes, valid UTF-8."""
        start, length = self.string(where)
        if not 1 <= length <= limit:
            raise FormatError(f"{self.path}: {where}: expected a name of 1..{limit} bytes, got {length}")
        raw = self.data[start : start + length]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise FormatError(f"{self.path}: {where}: expected UTF-8, got {raw[:40]!r}") from exc

    def step(self, count: int, where: str) -> None:
        """Accounts for `count` things that are walked one by one."""
        self.steps += count
        if self.steps > MAX_STEPS:
            raise FormatError(f"{self.path}: {where}: expected at most {MAX_STEPS} strings and arrays, got more")

    def skip_strings(self, count: int, where: str) -> None:
        """Steps over strings without looking at them."""
        self.step(count, where)
        at, data, last, read = self.at, self.data, self.size - 8, U64.unpack_from
        for _ in range(count):
            if at > last:
                break
            at += 8 + read(data, at)[0]
        else:
            if at <= self.size:
                self.at = at
                return
        raise FormatError(f"{self.path}: {where}: expected {count} strings within the file, got past its end")
