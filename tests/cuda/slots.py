"""Issue slots of the GEMM kernels' main loops: what a warp issues for each byte of INT4 weights that it loads, groups of 128."""

import re
from dataclasses import dataclass

import cubin
import emulator

UNALIGNED = r"LDG\.E\.U16"  # of rows that do not begin at 16 bytes: not what is counted
STREAMED = r"LDG\.E\.NA\.128"


@dataclass(frozen=True)
class Loop:
    """A turn of the main loop, or the mean of its kinds.

    Attributes
    ----------
    slots : float
        Instructions that a warp issues.
    weight_bytes : int
        INT4 weights that a warp loads.
    warps : int
        Of a block, that do so.
    products : int
        Tensor-core instructions among the slots.
    turns : tuple of cubin.Turn
    """

    slots: float
    weight_bytes: int
    warps: int
    products: int
    turns: tuple[cubin.Turn, ...]

    @property
    def slots_per_byte(self) -> float:
        return self.slots / self.weight_bytes


def rows_of(name: str) -> int:
    """Rows of a block of a GEMM kernel, by its name; a GEMV's are 8."""
    match = re.search(r"_m(\d+)z?$", name)
    return int(match[1]) if match else 8


def is_gemm(name: str) -> bool:
    return re.search(r"_w4a(16|8)_", name) is not None


def main_loop(kernel: emulator.Kernel, blocks: list[cubin.Block]) -> Loop:
    """The loop over K of a kernel with INT4 weights, of aligned activations and groups of 128. Raises LookupError without one."""
    rows, zeros = rows_of(kernel.name), kernel.name.endswith("z")
    if kernel.file == "w4a16_sm90a":
        # 128 k: sixteen products of 64 columns by 16 k, a sum for each of the lane's elements. Another warp copies.
        return _loop(blocks, r"HGMMA", ("FFMA",), [(rows,)], 2048, 8)
    if "gemv" in kernel.name:
        # Four steps of 32 k, of which one ends a group: 16 loads of activations, 4 of weights.
        return _loop(blocks, r"HMMA", ("FFMA", STREAMED, r"LDG\.E\.CONSTANT"), [(8, 4, 16 + zeros)], 2048, 8)
    pieces = -(-rows * 8 // 256)  # copies of activations a thread
    if "w4a8" in kernel.name:
        # 128 k: copies of four steps of weights, of scales and zeros.
        return _loop(blocks, r"IMMA", ("FFMA", "LDGSTS"), [(rows, pieces + 5 + zeros)], 2048, 8)
    # 64 k: two steps; every second turn ends a group, the others copy a group's scales.
    kinds = [(0, pieces + 3), (rows, pieces + 2 + zeros)]
    return _loop(blocks, r"HMMA", ("FFMA", "LDGSTS"), kinds, 1024, 8)


def _loop(blocks, products, by, kinds, weight_bytes, warps) -> Loop:
    turns = cubin.turns(blocks, products, UNALIGNED, by)
    try:
        found = tuple(turns[kind] for kind in kinds)
    except KeyError as exc:
        raise LookupError(f"no turn with {dict(zip(by, exc.args[0], strict=True))}; there are {sorted(turns)}") from exc
    mean = sum(turn.slots for turn in found) / len(found)
    return Loop(mean, weight_bytes, warps, found[0].count(products), found)
