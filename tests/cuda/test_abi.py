"""What the launcher hands over is what the kernels take: sizes in the compiled code, every field's place by the GPU's compiler."""

import cubin
import emulator
import pytest

from assay._ffi import ffi, lib
from assay.cuda import compile as nvrtc

STRUCTS = sorted({kernel.args_struct for kernel in emulator.kernels().values()})


def launcher_table() -> dict[str, tuple[int, int, int, int]]:
    """Bytes of arguments, threads, shared bytes and blocks by kernel, as csrc/cuda/launcher.c was compiled."""
    result = {}
    for i in range(lib.assay_cuda_kernel_count()):
        name, unit = ffi.new("char **"), ffi.new("char **")
        bytes_, smem = ffi.new("size_t *"), ffi.new("size_t *")
        threads, blocks = ffi.new("unsigned *"), ffi.new("unsigned *")
        assert lib.assay_cuda_kernel_info(i, name, unit, bytes_, threads, smem, blocks) == lib.ASSAY_OK
        result[ffi.string(name[0]).decode()] = (bytes_[0], threads[0], smem[0], blocks[0])
    return result


def test_the_launcher_has_the_table_that_the_kernels_were_compiled_from():
    assert launcher_table() == {
        k.name: (ffi.sizeof(k.args_struct), k.threads, k.smem_bytes, k.min_blocks) for k in emulator.kernels().values()
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", nvrtc.TARGETS)
def test_a_kernel_takes_one_argument_of_the_struct_s_size(images, target):
    for image in images(target).values():
        found = cubin.parameters(image.code)
        assert set(found) == set(image.usage)
        for name, taken in found.items():
            size = ffi.sizeof(emulator.kernels()[name].args_struct)
            assert taken.arguments == ((0, size),), name
            assert taken.size == size, name
            # The driver copies arguments into this constant bank, which must hold them.
            assert len(cubin.sections(image.code)[f".nv.constant0.{name}"]) == taken.offset + size, name


def fields(struct: str) -> list[tuple[str, int]]:
    """(path, offset) of every field, those of nested structs too."""
    found = []
    for name, field in ffi.typeof(struct).fields:
        found.append((name, field.offset))
        if field.type.kind == "struct":
            found += [(f"{name}.{path}", field.offset + offset) for path, offset in fields(field.type.cname)]
    return found


@pytest.mark.parametrize("struct", STRUCTS)
def test_every_field_lies_where_the_gpu_s_compiler_puts_it(tmp_path, struct):
    """The kernels' compiler refuses a unit whose static assertions do not hold."""
    try:
        compiler = nvrtc.Compiler()
    except nvrtc.CompilerMissingError as exc:
        pytest.skip(str(exc))
    checks = [f"sizeof({struct}) == {ffi.sizeof(struct)}"]
    checks += [f"__INTADDR__(&(({struct} *)0)->{path}) == {offset}" for path, offset in fields(struct)]
    assert len(checks) > 2
    for name in ("assay.h", "cuda/assay_cuda.h", "cuda/ptx.cuh", "cuda/ptx_device.cuh", "cuda/kernels.def"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((emulator.CUDA.parent / name).read_bytes())

    def compile_with(lines: list[str]) -> None:
        text = "".join(f'static_assert({line}, "");\n' for line in lines)
        (tmp_path / "cuda" / "layout.cuh").write_text('#include "assay_cuda.h"\n' + text)
        compiler.compile(tmp_path, "layout", nvrtc.PTX)

    compile_with(checks)
    with pytest.raises(nvrtc.CompileError, match="static assertion failed"):
        compile_with([checks[-1].replace("==", "!=")])
