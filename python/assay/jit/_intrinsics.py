"""What the twins need and Numba does not offer: a fused multiply-add, bits of floats, wide loads of bytes."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def fma32(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """float32 x y + z with one rounding."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def half_to_float(typingctx: Any, bits: Any) -> Any:
    """The float32 of a float16's bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # By integer arithmetic: LLVM's half type would call a helper that Numba's runtime lacks on some CPUs.
        wide, single = ir.IntType(32), ir.FloatType()
        h = builder.zext(builder.trunc(args[0], ir.IntType(16)), wide)
        sign = builder.shl(builder.and_(h, wide(0x8000)), wide(16))
        magnitude = builder.shl(builder.and_(h, wide(0x7FFF)), wide(13))
        # Rebias by an exact multiplication: 2^112 moves the exponent, and makes subnormals normal.
        value = builder.fmul(builder.bitcast(magnitude, single), single(2.0**112))
        return builder.bitcast(builder.or_(builder.bitcast(value, wide), sign), single)

    return types.float32(bits), codegen


@intrinsic
def bits_of_float(typingctx: Any, x: Any) -> Any:
    """The bits of a float32, as uint32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def float_of_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 of a uint32's bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


def _load(context: Any, builder: Any, signature: Any, args: Any, kind: Any) -> Any:
    """An unaligned load of a type from a uint8 array, at a byte offset."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    address = builder.gep(array.data, [args[1]])
    load = builder.load(builder.bitcast(address, kind.as_pointer()))
    load.align = 1
    return load


@intrinsic
def bits_of_double(typingctx: Any, x: Any) -> Any:
    """The bits of a float64, as uint64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.uint64(types.float64), codegen


@intrinsic
def double_of_bits(typingctx: Any, bits: Any) -> Any:
    """The float64 of a uint64's bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.uint64), codegen


@intrinsic
def load_lane(typingctx: Any, data: Any, at: Any) -> Any:
    """Four bytes of a uint8 array as one little-endian int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(context, builder, signature, args, ir.IntType(32))

    return types.int32(data, types.intp), codegen


@intrinsic
def load_float(typingctx: Any, data: Any, at: Any) -> Any:
    """Four bytes of a uint8 array as one little-endian float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(context, builder, signature, args, ir.FloatType())

    return types.float32(data, types.intp), codegen


__all__ = [
    "bits_of_double", "bits_of_float", "double_of_bits", "float_of_bits", "fma32", "half_to_float", "load_float", "load_lane",
]  # fmt: skip
