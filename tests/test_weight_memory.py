"""Where packed weights lie: on cache lines, on huge pages, small ones together, and freed with the last of them."""

import gc
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import assay
from assay.ops import _gemm

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's map of this process")
SIZES = (1, 63, 64, 65, 4096, 100_000, 1 << 20, (2 << 20) - 1, 2 << 20, 3_900_000, (16 << 20) - 1, 16 << 20, 40_000_001)


def address(array):
    return array.__array_interface__["data"][0]


def mapping(at):
    """The lines of the kernel's description of the mapping that an address lies in; None where there is none."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    heads = [i for i, line in enumerate(lines) if "-" in line.split()[0] and not line.split()[0].endswith(":")]
    for begin, end in zip(heads, [*heads[1:], len(lines)], strict=True):
        low, high = (int(word, 16) for word in lines[begin].split()[0].split("-"))
        if low <= at < high:
            return lines[begin:end]
    return None


def flags(at):
    return next(line for line in mapping(at) if line.startswith("VmFlags:")).split()


@pytest.mark.parametrize("nbytes", SIZES)
def test_pieces_are_writable_memory_of_their_own_on_cache_lines(nbytes):
    pieces = [_gemm.aligned_empty(nbytes) for _ in range(3)]
    for value, piece in enumerate(pieces, 1):
        assert (piece.dtype, piece.shape) == (np.uint8, (nbytes,))
        assert address(piece) % 64 == 0
        piece[:] = value
    assert all((piece == value).all() for value, piece in enumerate(pieces, 1))


@linux
@pytest.mark.parametrize("nbytes", SIZES)
def test_first_and_last_byte_are_where_huge_pages_are_wanted(nbytes):
    piece = _gemm.aligned_empty(nbytes)
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no huge pages")
    for at in (address(piece), address(piece) + nbytes - 1):
        assert "hg" in flags(at)


def test_matrices_of_a_small_model_lie_within_few_huge_pages():
    scales = np.ones((256, 20), np.float16)
    packed = [assay.pack(np.zeros((256, 320), np.uint8), scales) for _ in range(40)]
    pages = {(address(w.data) + at) >> 21 for w in packed for at in (0, w.nbytes - 1)}
    # 40 of 92,160 bytes are two huge pages; the slab may begin or end among them.
    assert len(pages) <= 4


@linux
def test_a_slab_is_freed_with_its_last_piece():
    slabs = _gemm._Slabs()
    pieces = [slabs.take(1 << 20) for _ in range(2)]
    at = address(pieces[0])
    slabs.take(_gemm._SLAB - (1 << 20))  # no room: another slab
    del pieces[0]
    gc.collect()
    assert mapping(at) is not None
    pieces[0][:] = 7
    # Others may be mapped where it was; this one, wanted on huge pages and as long as a slab, is gone.
    length = "".join(mapping(at)[0])
    pieces.clear()
    gc.collect()
    assert mapping(at) is None or mapping(at)[0] != length


def test_threads_get_pieces_that_do_not_overlap():
    slabs, found = _gemm._Slabs(), []

    def work():
        found.extend(slabs.take(1000) for _ in range(200))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    places = sorted(address(piece) for piece in found)
    assert len(places) == 800
    assert min(np.diff(places)) >= 1000
