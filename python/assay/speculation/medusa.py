"""Medusa heads: residual blocks on the last hidden state, each with an output matrix (arXiv:2401.10774)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError


class MedusaHeads:
    """Heads that guess the tokens after the next one.

    Head i is ``lm_head(block_k(...block_1(h)))`` with ``block(x) = x + silu(W x + b)``.

    Parameters
    ----------
    blocks : list of list of (W [H, H], b [H])
        Of each head.
    outputs : list of [V, H]
        Of each head.
    quantize : bool
        Run the matrices through :func:`assay.w4a8_gemm`, in INT4. Drafts need no exactness: a worse head is accepted
        less, and the output stays what it is.
    group_size : int
        Of the INT4 weights; H must be a multiple of it.
    """

    def __init__(
        self, blocks: list[list[tuple[np.ndarray, np.ndarray]]], outputs: list[np.ndarray], *, quantize: bool = False,
        group_size: int = 32,
    ) -> None:  # fmt: skip
        if not outputs or len(blocks) != len(outputs):
            raise ValueError(f"blocks: expected those of {len(outputs)} heads, at least 1, got {len(blocks)}")
        vocab, hidden = outputs[0].shape
        for i, (layers, output) in enumerate(zip(blocks, outputs, strict=True)):
            if output.shape != (vocab, hidden):
                raise ValueError(f"outputs[{i}]: expected {[vocab, hidden]}, got {list(output.shape)}")
            for j, (weight, bias) in enumerate(layers):
                if weight.shape != (hidden, hidden) or bias.shape != (hidden,):
                    raise ValueError(
                        f"blocks[{i}][{j}]: expected {[hidden, hidden]} and {[hidden]}, got {list(weight.shape)} and "
                        f"{list(bias.shape)}"
                    )
        self.hidden_size, self.vocab_size = hidden, vocab
        self._blocks = [[(_matrix(w, quantize, group_size), b) for w, b in layers] for layers in blocks]
        self._outputs = [_matrix(w, quantize, group_size) for w in outputs]

    @property
    def num_heads(self) -> int:
        return len(self._outputs)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """float32 [num_heads, V] of one hidden state [H]."""
        h = np.asarray(hidden, np.float32)
        if h.shape != (self.hidden_size,):
            raise ValueError(f"hidden: expected [{self.hidden_size}], got {list(h.shape)}")
        rows = []
        for layers, output in zip(self._blocks, self._outputs, strict=True):
            x = h
            for weight, bias in layers:
                y = weight(x) + bias
                x = x + y / (1 + np.exp(-np.clip(y, -80, 80)))
            rows.append(output(x))
        return np.array(rows, np.float32)

    @classmethod
    def load(cls, path: str | Path, *, quantize: bool = False, group_size: int = 32) -> "MedusaHeads":
        """From a published checkpoint: a file of safetensors or of torch.save (FasterDecoding's ``medusa_lm_head.pt``), or the
        folder that holds ``medusa_lm_head.safetensors`` or ``medusa_lm_head.pt``.

        ``medusa_head.{i}.{j}.linear.weight`` and ``.bias`` for each residual block j of head i, then
        ``medusa_head.{i}.{k}.weight``; the prefix may be absent, as in ``medusa_lm_head``, or follow another. PyTorch is not
        needed, and what a pickle asks for is not run (:mod:`assay.formats.torch_file`).

        Raises
        ------
        FormatError
            A missing or superfluous tensor of a head, shapes that do not fit, values that are no floats; a folder without
            such a file.
        """
        from ..formats.safetensors import open_safetensors
        from ..formats.torch_file import read_torch_file

        path = _heads_file(Path(path))
        arrays = {}
        if path.suffix in _PICKLED:
            for name, (dtype, values) in read_torch_file(path).items():
                if _strip(name):
                    arrays[tuple(_strip(name))] = _floats(values, dtype, f"{path}: tensor {name}")
        else:
            with open_safetensors(path) as file:
                for name in filter(_strip, file.tensors):
                    arrays[tuple(_strip(name))] = _floats(
                        file.array(name), file.tensors[name].dtype, f"{path}: tensor {name}"
                    )
        return cls.from_tensors(arrays, str(path), quantize=quantize, group_size=group_size)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[tuple[str, ...], np.ndarray], where: str, *, quantize: bool = False, group_size: int = 32
    ) -> "MedusaHeads":
        """From float arrays by the parts of their names: ``("0", "0", "linear", "weight")``."""
        left = dict(tensors)
        blocks: list[list[tuple[np.ndarray, np.ndarray]]] = []
        outputs: list[np.ndarray] = []
        while any(key[0] == str(len(outputs)) for key in left):
            head = str(len(outputs))
            layers: list[tuple[np.ndarray, np.ndarray]] = []
            while (head, str(len(layers)), "linear", "weight") in left:
                at = (head, str(len(layers)), "linear")
                if (*at, "bias") not in left:
                    raise FormatError(f"{where}: expected a tensor {'.'.join((*at, 'bias'))}, which is missing")
                layers.append((left.pop((*at, "weight")), left.pop((*at, "bias"))))
            output = (head, str(len(layers)), "weight")
            if output not in left:
                raise FormatError(f"{where}: expected a tensor {'.'.join(output)}, which is missing")
            blocks.append(layers)
            outputs.append(left.pop(output))
        if not outputs or left:
            got = f"also {'.'.join(next(iter(left)))}" if left else "none"
            raise FormatError(f"{where}: expected the tensors of Medusa heads 0, 1, ..., got {got}")
        try:
            return cls(blocks, outputs, quantize=quantize, group_size=group_size)
        except ValueError as exc:
            raise FormatError(f"{where}: {exc}") from None


_PICKLED = (".pt", ".pth", ".bin")


def _heads_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for suffix in (".safetensors", ".pt"):
        if (path / f"medusa_lm_head{suffix}").exists():
            return path / f"medusa_lm_head{suffix}"
    raise FormatError(f"{path}: expected medusa_lm_head.safetensors or medusa_lm_head.pt in this folder")


def _strip(name: str) -> list[str]:
    """The parts of a head's name from its number on; none for another tensor."""
    parts = name.split(".")
    if "medusa_head" in parts:
        parts = parts[parts.index("medusa_head") + 1 :]
    return parts if parts and parts[0].isdecimal() else []


def _floats(array: np.ndarray, dtype: str, what: str) -> np.ndarray:
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype not in ("F16", "F32", "F64"):
        raise FormatError(f"{what}: expected F16, BF16 or F32, got {dtype}")
    return array.astype(np.float32)


def _matrix(weight: np.ndarray, quantize: bool, group_size: int) -> Any:
    """x to ``weight @ x``."""
    if not quantize:
        w = np.ascontiguousarray(weight, np.float32)
        return lambda x: w @ x
    from ..ops.int4 import pack, w4a8_gemm
    from ..ops.quantize import quantize_int4

    packed = pack(*quantize_int4(np.ascontiguousarray(weight, np.float32), group_size), group_size=group_size)
    return lambda x: w4a8_gemm(x[None], packed)[0]
