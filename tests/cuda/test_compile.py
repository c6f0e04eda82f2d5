"""What NVRTC makes of every kernel, without a GPU: no spill, no stack, within the budgets of kernels.def."""

import pytest

from assay.cuda import _images
from assay.cuda import compile as nvrtc

ROOT = _images.sources()
REGISTERS = 65536
#: One target a unit, here: build_cubins.py does the same for all of them, which takes minutes.
CASES = [(unit, next(t for t in nvrtc.targets_of(unit))) for unit in nvrtc.units(ROOT)]


@pytest.fixture(scope="module")
def compiler():
    try:
        return nvrtc.Compiler()
    except nvrtc.CompilerMissingError as exc:
        pytest.skip(str(exc))


@pytest.mark.parametrize(("unit", "target"), CASES)
def test_no_spill_no_stack_and_the_blocks_that_were_asked_for(compiler, unit, target):
    image = nvrtc.compile_cached(ROOT, unit, target, compiler)
    lines = {k.name: k for k in nvrtc.read_kernels(ROOT) if k.unit == unit}
    assert set(image.usage) == set(lines)
    for name, used in image.usage.items():
        assert (used.stack_bytes, used.spill_store_bytes, used.spill_load_bytes) == (0, 0, 0), name
        assert used.smem_bytes == 0, f"{name}: static shared memory, which the launcher does not count"
        # Registers come by 8 a thread, 256 a warp.
        registers = -(-used.registers // 8) * 8 * int(lines[name].threads)
        assert registers * int(lines[name].min_blocks) <= REGISTERS, name


def test_a_damaged_file_of_the_cache_is_made_again(compiler, tmp_path):
    first = nvrtc.compile_cached(ROOT, "probe", "sm_80", compiler, tmp_path)
    (packed,) = tmp_path.glob("*.z")
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
