"""Invented tables of measured kernels: a device whose true law is known."""

import numpy as np

from assay.tables import KernelTable

OVERHEAD_S, BYTES_PER_S, OPS_PER_S = 4e-6, 2.5e12, 4.0e14


def gemm_time(m, n, k, weight_bytes=2.0, waves_of=132):
    """Seconds: roofline, 128 x 128 tiles in waves over the multiprocessors, and a slow path for odd M."""
    moved = weight_bytes * n * k + 2.0 * m * (n + k)
    tiles = np.ceil(m / 128) * np.ceil(n / 128) / waves_of
    lost = np.where(tiles > 1, np.ceil(tiles) / tiles, 1.0)
    compute = 2.0 * m * n * k / OPS_PER_S * lost
    return (OVERHEAD_S + ((moved / BYTES_PER_S) ** 3 + compute**3) ** (1 / 3)) * np.where(m % 2, 1.05, 1.0)


def gemm_table(noise=0.005, system="NVIDIA H200", dtype="bfloat16", seed=0, sides=9, variant="gemm", power=False):
    """Times of a grid of shapes with relative noise."""
    side = np.unique(np.round(np.geomspace(256, 16384, sides) / 64) * 64)
    m, n, k = (a.ravel() for a in np.meshgrid([1.0, 3, 16, 64, 129, 256, 1024, 4096], side, side, indexing="ij"))
    rng = np.random.default_rng(seed)
    time_s = gemm_time(m, n, k) * np.exp(noise * rng.standard_normal(m.size))
    busy = (2 * n * k + 2 * m * (n + k)) / BYTES_PER_S / time_s
    return KernelTable(
        op="gemm",
        dtype=dtype,
        system=system,
        source="test 1",
        variant=variant,
        sizes={"m": m, "n": n, "k": k},
        time_s=time_s,
        power_w=120.0 + 200.0 * np.minimum(busy, 1.0) if power else None,
    )


def columns(rows=4):
    """Columns of a small AIConfigurator gemm table."""
    return {
        "framework": np.array(["VLLM"] * rows, dtype=object),
        "version": np.array(["1.0"] * rows, dtype=object),
        "device": np.array(["NVIDIA H200"] * rows, dtype=object),
        "op_name": np.array(["gemm"] * rows, dtype=object),
        "kernel_source": np.array(["a"] * rows, dtype=object),
        "gemm_dtype": np.array(["bfloat16"] * rows, dtype=object),
        "m": np.arange(1, rows + 1),
        "n": np.full(rows, 64),
        "k": np.full(rows, 32),
        "latency": np.linspace(0.5, 1.0, rows),
        "power": np.full(rows, 100.0),
    }
