"""Whether a call is for the GPU: the device of its first array chooses."""

from typing import Any

import numpy as np


def on_device(x: Any, backend: str, stream: Any) -> bool:
    """Whether `x` is on a GPU, with the other arguments that this decides about.

    Raises
    ------
    ValueError
        A backend of the CPU with an array on a GPU, or a stream with one on the host.
    """
    if isinstance(x, np.ndarray) and stream is None:
        return False
    from ..cuda import device_of

    if device_of(x) is None:
        if stream is not None:
            raise ValueError("stream: expected None for arrays on the host")
        return False
    if backend != "c":
        raise ValueError(f"backend: expected 'c' for arrays on a GPU, got {backend!r}")
    return True
