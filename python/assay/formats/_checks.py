"""Checks that the readers share: every error names the tensor, what was wanted and what came."""

import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import FormatError


def bad(where: str, wanted: str, got: str) -> NoReturn:
    """Raises the error that says the three."""
    raise FormatError(f"{where}: expected {wanted}, got {got}")


def expect(
    array: Any,
    where: str,
    dtypes: Sequence[str],
    shape: Sequence[int | None],
    error: type[ValueError] = FormatError,
    says: str = "",
) -> np.ndarray:
    """`array`, if it is of one of the dtypes and of the shape; None in a shape stands for any size."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{where}: expected numpy.ndarray, got {type(array).__name__}")
    fits = len(array.shape) == len(shape) and all(w is None or w == s for s, w in zip(array.shape, shape, strict=True))
    if array.dtype.name not in dtypes or not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise error(f"{where}: expected {' or '.join(dtypes)} [{wanted}]{says}, got {array.dtype} {list(array.shape)}")
    return array


def whole_groups(k: int, group_size: int, where: str) -> tuple[int, int]:
    """(group size, groups a row); -1 stands for one group a row."""
    size = k if group_size == -1 else group_size
    if size < 1:
        bad(where, "a positive group_size or -1", str(group_size))
    if k % size:
        bad(where, f"K to be a multiple of group_size = {size} (no short last group)", f"K = {k}")
    return size, k // size


def eights(where: str, **sizes: int) -> None:
    """Sizes of what is packed by eight codes to a word."""
    for axis, size in sizes.items():
        if size % 8 or size < 1:
            bad(where, f"{axis} to be a multiple of 8 (eight codes to a word)", f"{axis} = {size}")


def matrix_shape(shape: Sequence[int], where: str) -> tuple[int, int]:
    """(N, K), both at least 1."""
    if len(shape) != 2 or min(shape) < 1:
        bad(where, "(N, K)", str(tuple(shape)))
    return int(shape[0]), int(shape[1])


def scales_of(array: Any, where: str, shape: tuple[int, int], dtype: str | None, says: str) -> np.ndarray:
    """float16 and float32 as they are; bfloat16, as raw uint16, widened exactly."""
    if dtype not in (None, "float16", "float32", "bfloat16"):
        raise ValueError(f"scales_dtype: expected 'float16', 'float32' or 'bfloat16', got {dtype!r}")
    if dtype == "bfloat16":
        raw = expect(array, where, ("uint16",), shape, says=says + " (raw bfloat16)")
        scales = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        scales = expect(array, where, (dtype,) if dtype else ("float16", "float32"), shape, says=says)
    if not np.isfinite(scales).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(scales))[0])
        bad(where, "finite scales", f"{scales[at]} at {list(at)}")
    return np.array(scales, order="C")  # a copy: tensors of a file may be unaligned, and are the file's


def short(name: str) -> str:
    """A name as errors quote it: its repr, cut to 120 characters."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys at any depth."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise FormatError(f"{path}: {what}: {short(key)}: expected once, got twice")
                seen.add(key)
        return out

    def refuse(text: str) -> NoReturn:
        raise FormatError(f"{path}: {what}: expected JSON numbers, got {text}")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except FormatError:
        raise
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"{path}: {what}: expected JSON, got {reprlib.repr(raw[:64])} ({exc})") from exc
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {what}: expected a JSON object, got {type(value).__name__}")
    return value
