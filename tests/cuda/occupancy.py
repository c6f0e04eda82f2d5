"""Blocks of a kernel that one multiprocessor holds, from what ptxas reports and the published limits of its architecture."""

from dataclasses import dataclass

# CUDA C++ Programming Guide 12.9, "Compute Capabilities", table "Technical Specifications per Compute Capability". The same for
# all targets: 65,536 registers in four partitions, given to warps in pieces of 256; shared memory in pieces of 128 bytes, of
# which a block takes 1 KiB for the system.
PARTITIONS, PARTITION_REGISTERS, REGISTER_PIECE, SHARED_PIECE, SHARED_SYSTEM = 4, 16384, 256, 128, 1024


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor."""

    warps: int
    blocks: int
    shared_bytes: int  # of all blocks

    @property
    def shared_block(self) -> int:
        """The most that one block may ask for."""
        return self.shared_bytes - SHARED_SYSTEM


LIMITS = {
    "sm_80": Limits(64, 32, 164 << 10),
    "sm_86": Limits(48, 16, 100 << 10),
    "sm_89": Limits(48, 24, 100 << 10),
    "sm_90a": Limits(64, 32, 228 << 10),
    "sm_100a": Limits(64, 32, 228 << 10),
    "sm_120": Limits(48, 24, 100 << 10),
}


def up(n: int, piece: int) -> int:
    """n up to a multiple of piece."""
    return -(-n // piece) * piece


def blocks(target: str, registers: int, shared_bytes: int, threads: int) -> int:
    """Blocks of `threads` threads, of so many registers each, that one multiprocessor holds at a time; 0: none."""
    limits = LIMITS[target]
    warps = -(-threads // 32)
    if shared_bytes > limits.shared_block:
        return 0
    by_registers = PARTITIONS * (PARTITION_REGISTERS // up(registers * 32, REGISTER_PIECE)) // warps
    by_shared = limits.shared_bytes // up(shared_bytes + SHARED_SYSTEM, SHARED_PIECE)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)
