"""Tensors of a file that ``torch.save`` wrote, without PyTorch, and without running what its pickle asks for.

Such a file is a zip archive, not compressed: ``*/data.pkl`` names the tensors and says of each which storage, offset, shape and
strides it has; ``*/data/KEY`` holds a storage's bytes. Of the pickle only dictionaries of tensors are understood; whatever else it
would import is refused.
"""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError

_MOST_PICKLE_BYTES = 16 << 20
#: Names of storages to safetensors' names of dtypes, and what holds their bits.
_STORAGES = {
    "FloatStorage": ("F32", np.dtype("<f4")), "HalfStorage": ("F16", np.dtype("<f2")),
    "BFloat16Storage": ("BF16", np.dtype("<u2")), "DoubleStorage": ("F64", np.dtype("<f8")),
}  # fmt: skip


class _Tensor:
    """A tensor's place, as the pickle states it, until its storage is read."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> None:
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


class _Names(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise FormatError(f"expected tensors of floats alone, got {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and pid[1] in _STORAGES.values()):
            raise FormatError("expected storages of floats")
        return pid[1], str(pid[2])


def read_torch_file(path: str | Path) -> dict[str, tuple[str, np.ndarray]]:
    """Of every tensor its dtype, as safetensors calls it, and its values (of BF16 the bits, uint16).

    Raises
    ------
    FormatError
        No such archive; one that is compressed, truncated, big-endian or older (before PyTorch 1.6); a pickle that asks for
        anything but a dictionary of float tensors; tensors that reach beyond their storage.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except FormatError as exc:
        raise FormatError(f"{path}: {exc}") from None
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        EOFError,
    ) as exc:
        raise FormatError(f"{path}: expected an archive of torch.save, got {type(exc).__name__}: {exc}") from None


def _read(archive: zipfile.ZipFile) -> dict[str, tuple[str, np.ndarray]]:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise FormatError(f"expected one data.pkl, got {len(names)}")
    root = names[0].removesuffix("data.pkl")
    if archive.getinfo(names[0]).file_size > _MOST_PICKLE_BYTES:
        raise FormatError(
            f"data.pkl: expected at most {_MOST_PICKLE_BYTES} bytes, got {archive.getinfo(names[0]).file_size}"
        )
    if f"{root}byteorder" in archive.namelist() and _bytes(archive, f"{root}byteorder") != b"little":
        raise FormatError("byteorder: expected little")
    with archive.open(names[0]) as file:
        found = _Names(file).load()
    if not isinstance(found, dict):
        raise FormatError(f"expected a dictionary of tensors, got {type(found).__name__}")
    storages: dict[str, bytes] = {}
    tensors = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise FormatError(f"expected a dictionary of tensors, got {type(tensor).__name__} as {name!r}")
        (dtype, kind), key = tensor.storage
        if key not in storages:
            storages[key] = _bytes(archive, f"{root}data/{key}")
        tensors[name] = dtype, _view(np.frombuffer(storages[key], kind), tensor, name)
    return tensors


def _bytes(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:  # nothing small grows large
        raise FormatError(f"{name}: expected an entry that is not compressed")
    return archive.read(info)


def _view(storage: np.ndarray, tensor: _Tensor, name: str) -> np.ndarray:
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(x) is int and 0 <= x < 1 << 48 for x in numbers):
        raise FormatError(f"{name}: expected offset, shape and strides of 0 or more, got {offset}, {shape}, {strides}")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and last >= len(storage):
        raise FormatError(f"{name}: expected at most {len(storage)} elements of storage, got one at {last}")
    if 0 in shape:
        return np.empty(shape, storage.dtype)
    steps = tuple(step * storage.itemsize for step in strides)
    view: np.ndarray = np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)
    return view
