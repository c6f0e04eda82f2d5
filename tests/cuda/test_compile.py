"""What NVRTC makes of every kernel for every target, without a GPU: no spill, no stack, within the budgets of kernels.def."""

import budgets
import emulator
import occupancy
import pytest

from assay.cuda import _images
from assay.cuda import compile as nvrtc

ROOT = emulator.CUDA.parent
TARGETS = [pytest.param(target, marks=pytest.mark.timeout(900)) for target in nvrtc.TARGETS]


@pytest.fixture(scope="module")
def compiler():
    try:
        return nvrtc.Compiler()
    except nvrtc.CompilerMissingError as exc:
        pytest.skip(str(exc))


@pytest.mark.parametrize("target", TARGETS)
def test_no_spill_no_stack_and_the_blocks_that_were_asked_for(images, target):
    used = {name: usage for image in images(target).values() for name, usage in image.usage.items()}
    kernels = {k.name: k for k in emulator.kernels().values() if target in nvrtc.targets_of(k.file)}
    assert set(used) == set(kernels)
    for name, kernel in kernels.items():
        usage = used[name]
        assert (usage.stack_bytes, usage.spill_store_bytes, usage.spill_load_bytes) == (0, 0, 0), name
        assert usage.smem_bytes == 0, f"{name}: static shared memory, which the launcher does not count"
        fit = occupancy.blocks(target, usage.registers, kernel.smem_bytes, kernel.threads)
        # Where shared memory has no room for the blocks asked for, the registers must.
        room = occupancy.blocks(target, 1, kernel.smem_bytes, kernel.threads)
        assert fit >= min(kernel.min_blocks, room) >= 1, f"{name}: {fit} blocks a multiprocessor"


@pytest.mark.parametrize("target", TARGETS)
def test_registers_are_within_the_table(images, target):
    """docs/cuda-budgets.md, made by `python tests/cuda/budgets.py`."""
    table = budgets.read()
    for image in images(target).values():
        for name, usage in image.usage.items():
            assert usage.registers <= table[name][target], name


@pytest.mark.timeout(900)
def test_intermediate_code_for_later_gpus_holds_every_kernel(images):
    made = images(nvrtc.PTX)
    for kernel in emulator.kernels().values():
        if nvrtc.PTX in nvrtc.targets_of(kernel.file):
            assert f".entry {kernel.name}(".encode() in made[kernel.file].code
    # The oldest version that drivers for CUDA 12.9 and later take.
    assert all(image.code.startswith(b"//") and b"\n.version 8.8\n" in image.code for image in made.values())


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "target", "blocks"),
    [
        (32, 0, 1024, "sm_80", 2),  # threads
        (33, 0, 1024, "sm_80", 1),  # registers: 40 a thread
        (16, 0, 32, "sm_86", 16),  # blocks
        (64, 49152, 256, "sm_86", 2),  # shared memory
        (255, 0, 256, "sm_120", 1),
        (128, 102400 - 1024, 256, "sm_89", 1),
        (128, 102400 - 1023, 256, "sm_89", 0),
        (168, 208960, 384, "sm_90a", 1),
        (32, 0, 64, "sm_100a", 32),
    ],
)
def test_occupancy_by_hand(registers, shared, threads, target, blocks):
    assert occupancy.blocks(target, registers, shared, threads) == blocks


def test_a_damaged_file_of_the_cache_is_made_again(compiler, tmp_path):
    first = nvrtc.compile_cached(ROOT, "probe", "sm_80", compiler, tmp_path)
    (packed,) = tmp_path.glob("*.xz")
    packed.write_bytes(packed.read_bytes()[:-7])
    assert nvrtc.compile_cached(ROOT, "probe", "sm_80", compiler, tmp_path).code == first.code


def test_a_spill_is_seen_in_the_log():
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_80'\nptxas info    : Function properties for k\n"
        "    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 400 bytes cmem[0]\n"
    )
    assert nvrtc.parse_usage(log) == {"k": nvrtc.Usage(255, 24, 20, 16, 0, 1)}


@pytest.mark.parametrize(
    ("capability", "target"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), None), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100a"),
     ((10, 3), None), ((12, 0), "sm_120"), ((12, 1), "sm_120"), ((7, 5), None)],
)  # fmt: skip
def test_the_target_that_runs_on_a_gpu(capability, target):
    assert _images.best_target(*capability) == target
