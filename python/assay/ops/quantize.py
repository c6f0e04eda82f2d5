"""INT4 weights from float ones: arguments are checked here, the work is :mod:`assay.quantize`'s."""

from typing import Any

import numpy as np

from .. import reference
from .._ffi import as_tensor
from ..quantize import QuantizationError, quantize_gptq, quantize_mse
from ..quantize import quantization_error as measure_error
from ._gemm import check_group

METHODS = ("rtn", "mse", "gptq")
#: Elements of a block of rows: bounded scratch memory, whatever the matrix.
_CHUNK = 1 << 22


def quantize_int4(
    w: Any,
    group_size: int = 32,
    symmetric: bool = True,
    *,
    method: str = "rtn",
    importance: Any = None,
    activations: Any = None,
    hessian: Any = None,
    percdamp: float = 0.01,
    act_order: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Quantises float weights to INT4, as :func:`assay.pack` takes them.

    Parameters
    ----------
    w : float32 [N, K]
        Finite. numpy or any CPU DLPack tensor.
    group_size : int
        32, 64, 128 (a divisor of K) or K.
    symmetric : bool
        Zero point 8 for every group (as GGUF's Q4_0) instead of one of its own.
    method : {"rtn", "mse", "gptq"}
        Round to nearest; the same with the scale (and zero point) of least squared error in each group; or GPTQ
        (arXiv 2210.17323), which lets columns still to come make up for the errors of those before, so that outputs
        rather than weights come out close.
    importance : float32 [K], optional
        With "mse": non-negative weight of a column's squared errors, such as its activations' mean square.
    activations : float32 [T, K], optional
        With "gptq": what the matrix multiplies, from a few thousand tokens of text.
    hessian : float32 or float64 [K, K], optional
        With "gptq", instead of `activations`: their A^T A, times any factor, summed over as many batches as there are.
    percdamp : float
        With "gptq": share of the Hessian's mean diagonal that is added to its diagonal, at least 0.
    act_order : bool
        With "gptq": the columns of the largest activations first. Groups stay runs along K ("static groups"), so the
        result needs no g_idx.

    Returns
    -------
    qweight : uint8 [N, ceil(K/2)]
        Low nibble = even k.
    scales : float16 [N, K / group_size]
    zeros : uint8 [N, K / group_size] or None

    Raises
    ------
    TypeError, ValueError
        Naming the argument: a NaN or infinity, a group too large for a float16 scale, a shape that does not fit, an
        argument of another method, a Hessian that is not positive semidefinite.
    """
    array = as_tensor(w, "w", ("float32",), 2).array
    n, k = array.shape
    if n == 0 or k == 0:
        raise ValueError(f"w: expected at least one row and column, got shape {[n, k]}")
    check_group(k, group_size)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    for name, value, owner in (
        ("importance", importance, "mse"),
        ("activations", activations, "gptq"),
        ("hessian", hessian, "gptq"),
    ):
        if value is not None and method != owner:
            raise ValueError(f"{name}: expected only with method {owner!r}, got method {method!r}")
    weight = None if importance is None else _importance(importance, k)
    h = _hessian(activations, hessian, percdamp, k) if method == "gptq" else None
    parts = []
    for at in range(0, n, max(1, _CHUNK // k)):
        block = np.asarray(array[at : at + max(1, _CHUNK // k)])
        _check_finite(block, "w", at)
        with np.errstate(over="ignore"):
            plain = reference.quantize_int4(block, group_size, symmetric)
        if not np.isfinite(plain[1]).all():
            raise ValueError("w: a group's scale is beyond float16's range (65504)")
        if method == "mse":
            plain = quantize_mse(np.ascontiguousarray(block), group_size, symmetric, weight)
        parts.append(plain)
    if h is not None:
        return quantize_gptq(array, h, group_size, symmetric, percdamp=percdamp, act_order=act_order)
    qweight, scales, zeros = zip(*parts, strict=True)
    return np.concatenate(qweight), np.concatenate(scales), None if zeros[0] is None else np.concatenate(zeros)


def quantization_error(
    w: Any, qweight: Any, scales: Any, zeros: Any = None, *, group_size: int | None = None, activations: Any = None
) -> QuantizationError:
    """What quantisation did to weights, and to their products with activations: relative RMS errors, in float64.

    Parameters
    ----------
    w : float32 [N, K]
        The weights that were quantised.
    qweight, scales, zeros
        As :func:`assay.quantize_int4` gives them: ``assay.quantization_error(w, *quantised, activations=a)``.
    group_size : int, optional
        Default: K / scales.shape[1].
    activations : float32 [T, K], optional

    Returns
    -------
    QuantizationError
        ``weight`` = ||W' - W|| / ||W||, and ``output`` = ||A W'^T - A W^T|| / ||A W^T|| or None.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was wanted and what came.
    """
    array = as_tensor(w, "w", ("float32",), 2).array
    n, k = array.shape
    q = as_tensor(qweight, "qweight", ("uint8",), 2).array
    s = as_tensor(scales, "scales", ("float16", "float32"), 2).array
    if q.shape != (n, (k + 1) // 2):
        raise ValueError(f"qweight: expected uint8 [N, ceil(K/2)] = {[n, (k + 1) // 2]}, got {list(q.shape)}")
    if group_size is None:
        if s.shape[1] < 1 or k % s.shape[1]:
            raise ValueError(f"scales: expected [N, K/group_size] with K = {k}, got {list(s.shape)}")
        group_size = k // s.shape[1]
    if group_size < 1 or k % group_size or s.shape != (n, k // group_size):
        raise ValueError(f"scales: expected [N, K/group_size] with group_size = {group_size}, got {list(s.shape)}")
    z = None if zeros is None else as_tensor(zeros, "zeros", ("uint8",), 2).array
    if z is not None and z.shape != s.shape:
        raise ValueError(f"zeros: expected [N, K/group_size] = {list(s.shape)}, got {list(z.shape)}")
    a = None if activations is None else _activations(activations, k)
    return measure_error(array, q, s, z, group_size, a)


def _check_finite(x: np.ndarray, name: str, first_row: int = 0) -> None:
    if not np.isfinite(x).all():
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
        kind = "weights" if name == "w" else "values"
        raise ValueError(f"{name}: expected finite {kind}, got {x[bad]} at {[bad[0] + first_row, *bad[1:]]}")


def _importance(importance: Any, k: int) -> np.ndarray:
    x = as_tensor(importance, "importance", ("float32",), 1).array
    if x.shape != (k,):
        raise ValueError(f"importance: expected float32 [K] = [{k}], got {list(x.shape)}")
    _check_finite(x, "importance")
    if x.min() < 0:
        raise ValueError(f"importance: expected values of at least 0, got {x.min()}")
    top = x.max()
    return x / top if top > 0 else np.ones_like(x)  # neither over- nor underflow in the sums of squares


def _activations(activations: Any, k: int) -> np.ndarray:
    a = as_tensor(activations, "activations", ("float32",), 2).array
    if a.shape[1] != k or len(a) == 0:
        raise ValueError(f"activations: expected float32 [T, K] with T >= 1 and K = {k}, got {list(a.shape)}")
    _check_finite(a, "activations")
    return a


def _hessian(activations: Any, hessian: Any, percdamp: float, k: int) -> np.ndarray:
    if (activations is None) == (hessian is None):
        got = "neither" if hessian is None else "both"
        raise ValueError(f"method 'gptq': expected activations or hessian, got {got}")
    if not (np.isfinite(percdamp) and percdamp >= 0):
        raise ValueError(f"percdamp: expected a finite number of at least 0, got {percdamp}")
    if activations is not None:
        a = _activations(activations, k)
        h = np.zeros((k, k))
        for at in range(0, len(a), max(1, _CHUNK // k)):
            part = a[at : at + max(1, _CHUNK // k)].astype(np.float64)
            h += part.T @ part
        return h
    h = as_tensor(hessian, "hessian", ("float32", "float64"), 2).array
    if h.shape != (k, k):
        raise ValueError(f"hessian: expected [K, K] = {[k, k]}, got {list(h.shape)}")
    _check_finite(h, "hessian")
    top = float(np.abs(h).max())
    if np.abs(h - h.T).max() > 1e-4 * top or h.diagonal().min() < 0:
        raise ValueError("hessian: expected a symmetric matrix with a diagonal of at least 0")
    return h
