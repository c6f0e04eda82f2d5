"""Results of several arrays: new ones, or the caller's ``out`` written in place."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._ffi import Tensor, as_output


def as_outputs(
    out: Any, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Any]]:
    """The arrays to write, and what to return for them: the caller's own objects where given.

    Raises
    ------
    TypeError, ValueError
        `out` is no tuple of so many arrays, or one is of the wrong dtype or shape, or shares memory with another
        argument.
    """
    if out is None:
        fresh = [as_output(None, *spec) for spec in zip(names, dtypes, shapes, strict=True)]
        return fresh, [t.array for t in fresh]
    if not isinstance(out, tuple | list) or len(out) != len(names):
        raise TypeError(f"out: expected ({', '.join(names)}), got {type(out).__name__}")
    tensors = [as_output(*spec) for spec in zip(out, names, dtypes, shapes, strict=True)]
    for i, (given, tensor) in enumerate(zip(out, tensors, strict=True)):
        others = [*inputs, *tensors[i + 1 :]]  # each pair once
        if given is not None and any(np.may_share_memory(tensor.array, t.array, 0) for t in others):
            raise ValueError(f"{names[i]}: expected memory of its own, got memory shared with another argument")
    return tensors, [t.array if given is None else given for given, t in zip(out, tensors, strict=True)]


def dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous stand-ins, for kernels that know no row stride, where a tensor is not contiguous (and aligned) itself."""
    return [t if t.array.flags.carray else as_output(None, "", t.dtype, t.shape) for t in tensors]


def copy_back(tensors: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    for tensor, stand_in in zip(tensors, written, strict=True):
        if tensor is not stand_in:
            tensor.array[...] = stand_in.array
