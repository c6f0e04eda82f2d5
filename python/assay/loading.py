"""Checkpoints straight into the kernels: every matrix packed, one at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["LoadedTensor", "load"]


@dataclass(frozen=True, eq=False)
class LoadedTensor:
    """A tensor of a checkpoint.

    Attributes
    ----------
    name : str
    shape : tuple of int
        (N, K), (..., N, K) of a stack, or any shape of a plain tensor.
    stored : str
        What the file has: "Q4_K", "GPTQ", "BF16", ...
    packed : tuple of PackedInt4, PackedInt8 or PackedWide
        One for every matrix of a stack, so one for a plain matrix; empty for what is no codes.
    perm : int32 [K] or None
        Multiply ``a[:, perm]`` instead of ``a`` (GPTQ's act-order).
    array : numpy.ndarray or None
        What is no codes: bfloat16 as raw uint16.
    """

    name: str
    shape: tuple[int, ...]
    stored: str
    packed: tuple[Any, ...]
    perm: np.ndarray | None
    array: np.ndarray | None


def load(path: str | Path, *, num_threads: int | None = None) -> Iterator[LoadedTensor]:
    """Every tensor of a checkpoint, quantised matrices packed without changing a weight.

    Parameters
    ----------
    path
        A GGUF file, a .safetensors file, the index of a sharded checkpoint, or a folder with either; of any format in
        docs/formats.md, or one that ``assay convert`` wrote.

    Yields
    ------
    LoadedTensor
        In the order of the file; the memory is one tensor's and what the caller keeps.

    Raises
    ------
    FormatError
        Naming the file, the tensor, what was wanted and what came.
    """
    from .errors import FormatError
    from .formats.checkpoint import open_checkpoint
    from .formats.weights import Int4Weights

    with open_checkpoint(path) as checkpoint:
        for t in checkpoint.tensors.values():
            if t.form is None:
                yield LoadedTensor(t.name, t.shape, t.stored, (), None, np.array(checkpoint.array(t.name)))
                continue
            w = checkpoint.weights(t.name)
            try:
                packed = tuple(_pack(part, num_threads) for part in _matrices(w, t.shape[-2]))
            except ValueError as exc:  # a group size that no kernel takes, a scale beyond float16
                raise FormatError(f"{checkpoint.path}: {t.name}: {exc}") from exc
            perm = w.perm if isinstance(w, Int4Weights) else None
            yield LoadedTensor(t.name, t.shape, t.stored, packed, perm, None)


def _matrices(w: Any, rows: int) -> Iterator[Any]:
    """The matrices of a stack whose rows are flattened."""
    from dataclasses import replace

    for at in range(0, w.n, rows):
        names = ("q", "scales", "zeros", "minimum")
        parts = {name: getattr(w, name)[at : at + rows] for name in names if getattr(w, name, None) is not None}
        yield replace(w, **parts)


def _pack(w: Any, num_threads: int | None) -> Any:
    from .formats.weights import Int4Weights, Int8Weights
    from .ops.int4 import pack
    from .ops.int8 import pack_int8

    if isinstance(w, Int4Weights):
        return pack(**w.pack_args(), num_threads=num_threads)
    if isinstance(w, Int8Weights):
        return pack_int8(**w.pack_args(), num_threads=num_threads)
    import assay

    return assay.pack_wide(**w.pack_args(), num_threads=num_threads)
