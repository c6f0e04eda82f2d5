"""The packed stream a line at a time: sixteen columns in one LLVM vector, by the host's dot-product instruction if it has one."""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

_I32 = ir.IntType(32)
_LANES = ir.VectorType(_I32, 16)


def _features() -> set[str]:
    """Instruction sets that Numba compiles for: the host's, unless its NUMBA_CPU_* and NUMBA_ENABLE_AVX settings say otherwise."""
    settings: Any = config  # numba sets its attributes at run time
    if settings.CPU_FEATURES is not None:
        return {f[1:] for f in settings.CPU_FEATURES.split(",") if f.startswith("+")}
    if settings.CPU_NAME is not None or not settings.ENABLE_AVX:
        return set()
    return {name for name, there in binding.get_host_cpu_features().items() if there}


def _splat(builder: Any, value: Any, shape: Any) -> Any:
    one = builder.insert_element(ir.Constant(shape, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, shape.count), [0] * shape.count))


def _same(shape: Any, value: int) -> Any:
    return ir.Constant(shape, [value] * shape.count)


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def _dot_vnni(builder: Any, total: Any, codes: Any, a: Any) -> Any:
    # With the signature that it had at first; LLVM's parser upgrades it where it has changed.
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", _LANES, total, codes, _splat(builder, a, _LANES))


def _dot_avx2(builder: Any, total: Any, codes: Any, a: Any) -> Any:
    half = ir.VectorType(_I32, 8)
    octets, pairs = ir.VectorType(ir.IntType(8), 32), ir.VectorType(ir.IntType(16), 16)
    sums = []
    for first in (0, 8):
        part = builder.shuffle_vector(codes, codes, ir.Constant(half, list(range(first, first + 8))))
        words = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs, builder.bitcast(part, octets),
                      builder.bitcast(_splat(builder, a, half), octets))  # fmt: skip
        sums.append(_call(builder, "llvm.x86.avx2.pmadd.wd", half, words, _same(pairs, 1)))
    return builder.add(total, builder.shuffle_vector(*sums, ir.Constant(_LANES, list(range(16)))))


def _dot_anywhere(builder: Any, total: Any, codes: Any, a: Any) -> Any:
    for b in range(4):
        code = builder.and_(builder.lshr(codes, _same(_LANES, 8 * b)), _same(_LANES, 255))
        signed = builder.ashr(builder.shl(a, _I32(24 - 8 * b)), _I32(24))
        total = builder.add(total, builder.mul(code, _splat(builder, signed, _LANES)))
    return total


def _dot() -> Any:
    features = _features()
    if "avx512vnni" in features:
        return _dot_vnni
    return _dot_avx2 if "avx2" in features else _dot_anywhere


def _pointer(context: Any, builder: Any, signature: Any, args: Any, i: int) -> Any:
    return context.make_array(signature.args[i])(context, builder, args[i]).data


def _load(builder: Any, address: Any, kind: Any) -> Any:
    load = builder.load(builder.bitcast(address, kind.as_pointer()))
    load.align = 1
    return load


@intrinsic
def dot_nibbles(typingctx: Any, packed: Any, at: Any, codes: Any, first: Any, steps: Any, dots: Any) -> Any:
    """dots[32] = sums of 4-bit codes times activation codes over `steps` steps of 8 k.

    The lines start at byte `at` of `packed` (uint8), the activations at `first` of `codes` (int8, one row); dots is int32.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        dot, index_type = _dot(), args[1].type
        line = builder.gep(_pointer(context, builder, signature, args, 0), [args[1]])
        code = builder.gep(_pointer(context, builder, signature, args, 2), [args[3]])
        out = _pointer(context, builder, signature, args, 5)
        # Low and high nibbles of either half of the columns in sums of their own: four chains hide the latency.
        sums = [cgutils.alloca_once(builder, _LANES) for _ in range(4)]
        for total in sums:
            builder.store(_same(_LANES, 0), total)
        with cgutils.for_range(builder, args[4]) as loop:
            for half in range(2):
                here = builder.add(builder.mul(loop.index, index_type(128)), index_type(64 * half))
                both = _load(builder, builder.gep(line, [here]), _LANES)
                for high in range(2):
                    nibbles = builder.and_(builder.lshr(both, _same(_LANES, 4 * high)), _same(_LANES, 0x0F0F0F0F))
                    a_at = builder.add(builder.mul(loop.index, index_type(8)), index_type(4 * high))
                    total = sums[2 * half + high]
                    builder.store(dot(builder, builder.load(total), nibbles,
                                      _load(builder, builder.gep(code, [a_at]), _I32)), total)  # fmt: skip
        for half in range(2):
            store = builder.store(
                builder.add(builder.load(sums[2 * half]), builder.load(sums[2 * half + 1])),
                builder.bitcast(builder.gep(out, [index_type(16 * half)]), _LANES.as_pointer()),
            )
            store.align = 4
        return context.get_dummy_value()

    return types.void(packed, types.intp, codes, types.intp, types.intp, dots), codegen


@intrinsic
def load_scales(typingctx: Any, packed: Any, at: Any, scales: Any) -> Any:
    """scales[32], float32, of the 32 float16 at byte `at` of `packed`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        halves, wide = ir.VectorType(ir.IntType(16), 32), ir.VectorType(_I32, 32)
        single = ir.VectorType(ir.FloatType(), 32)
        source = builder.gep(_pointer(context, builder, signature, args, 0), [args[1]])
        h = builder.zext(_load(builder, source, halves), wide)
        sign = builder.shl(builder.and_(h, _same(wide, 0x8000)), _same(wide, 16))
        magnitude = builder.shl(builder.and_(h, _same(wide, 0x7FFF)), _same(wide, 13))
        # As in half_to_float: the multiplication rebiases the exponent and makes subnormals normal.
        value = builder.fmul(builder.bitcast(magnitude, single), ir.Constant(single, [2.0**112] * 32))
        bits = builder.or_(builder.bitcast(value, wide), sign)
        target = _pointer(context, builder, signature, args, 2)
        store = builder.store(builder.bitcast(bits, single), builder.bitcast(target, single.as_pointer()))
        store.align = 4
        return context.get_dummy_value()

    return types.void(packed, types.intp, scales), codegen


@intrinsic
def load_zeros(typingctx: Any, packed: Any, at: Any, zeros: Any) -> Any:
    """zeros[32], int32, of the 16 bytes at `at` of `packed`: low nibbles, then high ones."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = builder.gep(_pointer(context, builder, signature, args, 0), [args[1]])
        both = builder.zext(_load(builder, source, ir.VectorType(ir.IntType(8), 16)), _LANES)
        target = _pointer(context, builder, signature, args, 2)
        for half, points in enumerate((builder.and_(both, _same(_LANES, 15)), builder.lshr(both, _same(_LANES, 4)))):
            address = builder.gep(target, [args[1].type(16 * half)])
            builder.store(points, builder.bitcast(address, _LANES.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(packed, types.intp, zeros), codegen


@intrinsic
def add_group(typingctx: Any, f: Any, first: Any, dots: Any, zeros: Any, total: Any, scales: Any, scale: Any) -> Any:
    """f[first:][:32] = fma(dots - zeros total, scales scale, f[first:][:32]): one group of one row, float32 and int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide, single = ir.VectorType(_I32, 32), ir.VectorType(ir.FloatType(), 32)

        def load(i: int, kind: Any) -> Any:
            return _load(builder, _pointer(context, builder, signature, args, i), kind)

        sums = builder.sub(load(2, wide), builder.mul(load(3, wide), _splat(builder, args[4], wide)))
        both = builder.fmul(load(5, single), _splat(builder, args[6], single))
        target = builder.gep(_pointer(context, builder, signature, args, 0), [args[1]])
        before = _load(builder, target, single)
        result = _call(builder, "llvm.fma.v32f32", single, builder.sitofp(sums, single), both, before)
        store = builder.store(result, builder.bitcast(target, single.as_pointer()))
        store.align = 4
        return context.get_dummy_value()

    return types.void(f, types.intp, dots, zeros, types.int32, scales, types.float32), codegen


__all__ = ["add_group", "dot_nibbles", "load_scales", "load_zeros"]
