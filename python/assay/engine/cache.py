"""A paged key-value cache."""

import numpy as np


class PagedCache:
    """Keys and values of all layers in blocks of `block_size` slots, handed out to requests and taken back.

    Attributes
    ----------
    keys, values : float32 [layers, num_blocks * block_size, kv_heads, head_dim]
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, *, num_blocks: int, block_size: int = 16) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks, block_size: expected at least 1, got {num_blocks}, {block_size}")
        shape = (layers, num_blocks * block_size, kv_heads, head_dim)
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def reserve(self, tokens: int) -> np.ndarray:
        """A table of blocks for so many tokens; ValueError when too few are free."""
        count = self.blocks_for(tokens)
        if count > len(self._free):
            raise ValueError(f"tokens: expected at most {len(self._free)} free blocks to be needed, got {count}")
        return np.array([self._free.pop() for _ in range(count)], np.int64)

    def release(self, table: np.ndarray) -> None:
        self._free += table.tolist()[::-1]

    def slots(self, table: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where the positions of a request lie."""
        found: np.ndarray = table[positions // self.block_size] * self.block_size + positions % self.block_size
        return found

    def move(self, source: np.ndarray, destination: np.ndarray) -> None:
        if len(source):
            self.keys[:, destination] = self.keys[:, source]
            self.values[:, destination] = self.values[:, source]
