"""What the kernels could do at best on GPUs that nobody has run them on, beside what others have published.

Usage: python tests/cuda/rooflines.py [docs/cuda-rooflines.md]

From the kernels' own machine code (issue slots of the main loop), traffic that the emulator counts, and datasheets
(python/assay/catalog/hardware.json). A prediction: nothing here was run on a GPU.
"""

import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import budgets
import cubin
import emulator
import mock_driver
import numpy as np
import slots

import assay
from assay import catalog, cuda

REPORT = Path(__file__).resolve().parents[2] / "docs" / "cuda-rooflines.md"
GPUS = {"a100-80gb-sxm": "sm_80", "h100-sxm": "sm_90a", "l40s": "sm_89", "rtx-4090": "sm_89", "b200": "sm_100a"}
TARGETS = GPUS | {"a10": "sm_86"}
SCHEDULERS, GROUP = 4, 128
N = K = 8192
COUNTED = 1024  # N and K of the emulated launches
LLAMA_7B = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
MARLIN, QQQ = "Marlin README", "QQQ README, GPU not named"
# GPU, kernel, [(N, K)], M, "x" (times float16) or "us", published, by whom. Read off charts where the README has only those.
ANCHORS = [
    *(("a10", "w4a16", ((73728, 18432),), m, "x", v, MARLIN) for m, v in ((16, 3.87), (32, 3.82), (64, 3.09), (128, 1.56))),
    ("a100-80gb-sxm", "w4a16", LLAMA_7B, 16, "x", 2.22, f"{MARLIN}, Llama-7B's layers"),
    ("h100-sxm", "w4a16", ((8192, 8192),), 1, "us", 26.9, "Marlin, 4.98 TFLOP/s: inclusionAI/humming PR 2"),
    ("h100-sxm", "w4a16", ((8192, 8192),), 4, "us", 27.0, "Marlin, 19.85 TFLOP/s: inclusionAI/humming PR 2"),
    ("h100-sxm", "w4a8", ((73728, 12288),), 1, "us", 172, "Machete, INT4 x FP8, Hopper: vLLM PR 23198"),
    ("h100-sxm", "w4a8", ((12288, 12288),), 32, "us", 88, "Machete, INT4 x FP8, Hopper: vLLM PR 23198"),
    *(("a100-80gb-sxm", "w4a8", ((8192, 21760),), m, "x", v, QQQ) for m, v in ((1, 3.29), (32, 2.60), (64, 1.85))),
]  # fmt: skip
HEAD = """# Rooflines of the GPU's kernels: predictions

Made by `python tests/cuda/rooflines.py`. **Nothing here was measured**: each time is the least that the kernel's own machine code and
a datasheet allow, the largest of three:

- *memory*: packed weights, activations and results, each once, at the datasheet's bandwidth;
- *issue*: instructions of the main loop (`slots` a byte of weights and warp, from the machine code of the GPU's target; groups of
  128, symmetric) at {schedulers} a clock and multiprocessor, at the datasheet's clock;
- *products*: multiplications of whole tiles at the tensor cores' dense peak. The tiles up to 64 rows use mma.sync, which on an H100 and
  a B200 reaches less than that peak.

Launches, the first and last tiles, partial sums, waits and clocks under load come on top: expect more time, never less. A quotient
of two rooflines ("x float16": of 16-bit weights by the same rules) is what a perfect kernel would gain.

## Main loops

`slots`: warp instructions a byte of INT4 weights. `read`: bytes that all multiprocessors read through L2 for a byte of weights, counted by the
emulator at N = K = {counted}; above 1 it is scales, activations read again by every block of columns, partial sums, and beyond a
block's rows the weights once more.

"""


def kernel_of(kind: str, m: int, target: str) -> str:
    """The float16 kernel that a plan takes for M rows (csrc/cuda/w4_gemm.c)."""
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    if kind == "w4a8":
        return f"assay_w4a8_m{rows}"
    if kind == "gemv":
        return "assay_w4a16_f16_gemv"
    if target == "sm_90a" and m > 64:
        return "assay_w4a16_sm90a_f16_m128"
    return f"assay_w4a16_f16_m{rows}"


@functools.cache
def code(unit: str, target: str) -> dict[str, list[cubin.Block]]:
    return cubin.disassemble(budgets.compiled(unit, target).code)


@functools.cache
def loop(name: str, target: str) -> slots.Loop:
    kernel = emulator.kernels()[name]
    return slots.main_loop(kernel, code(kernel.file, target)[name])


@dataclass(frozen=True)
class Roof:
    """Seconds by what bounds them."""

    memory: float
    issue: float
    products: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.issue, self.products)

    @property
    def bound(self) -> str:
        return max(("memory", "issue", "products"), key=lambda name: getattr(self, name))


def roof(device: str, kind: str, n: int, k: int, m: int) -> Roof:
    """The least time of C[M,N] = A[M,K] W[N,K]^T on a GPU of the catalog."""
    row = next(d for d in catalog.list_devices() if d["name"] == device)
    name = kernel_of(kind, m, TARGETS[device])
    block_m, weights = slots.rows_of(name), n * k / 2
    row_blocks = -(-m // block_m)
    moved = weights + 2 * n * k / GROUP + m * k * (1 if kind == "w4a8" else 2) + 4 * m * n
    issued = loop(name, TARGETS[device]).slots_per_byte * weights * row_blocks
    peak = row["int8_ops_per_s" if kind == "w4a8" else "ops_per_s"]
    return Roof(
        moved / row["memory_bytes_per_s"],
        issued / (SCHEDULERS * row["multiprocessors"] * row["clock_hz"]),
        2 * n * k * row_blocks * block_m / peak,
    )


def float16_seconds(device: str, n: int, k: int, m: int) -> float:
    """The same of 16-bit weights: memory or products."""
    row = next(d for d in catalog.list_devices() if d["name"] == device)
    return max((2 * n * k + 2 * m * k + 2 * m * n) / row["memory_bytes_per_s"], 2 * n * k * m / row["ops_per_s"])


def counted(kind: str, m: int, hopper: bool) -> float:
    """Bytes read through L2 for a byte of weights, by the emulator."""
    machine = mock_driver.Mock()
    cuda.forget_workspaces()
    cuda.refresh()
    machine.reset()
    machine.set(sms=16, memory=1 << 30, **({"major": 9, "smem_optin": 232448, "smem_per_sm": 233472} if hopper else {}))
    rng = np.random.default_rng(0)
    w = assay.pack(
        *assay.quantize_int4(rng.standard_normal((COUNTED, COUNTED)).astype(np.float32), group_size=GROUP)[:3]
    )
    a = cuda.to_device(rng.standard_normal((m, COUNTED)).astype(np.float16))
    op = assay.w4a8_gemm if kind == "w4a8" else assay.w4a16_gemm
    op(a, w.to_device(), **({"isa": "gemv"} if kind == "gemv" else {})).numpy()
    did = machine.counters()
    return (did.ldg_bytes + did.async_bytes + did.bulk_bytes) / (COUNTED * COUNTED / 2)


CASES = [("gemv", 1), *((kind, m) for kind in ("w4a16", "w4a8") for m in (16, 32, 64)), ("w4a16", 256)]


def loops_table() -> list[str]:
    targets = sorted(set(GPUS.values()))
    lines = [
        f"| kernel | {' | '.join(f'slots, {t}' for t in targets)} | read |",
        "| --- |" + " --- |" * (len(targets) + 1),
    ]
    for kind, m in [*CASES[:-1], ("sm90a", 256)]:
        hopper = kind == "sm90a"
        name = kernel_of("w4a16" if hopper else kind, m, "sm_90a" if hopper else "sm_80")
        cells = [f"{loop(name, t).slots_per_byte:.3f}" if t == "sm_90a" or not hopper else "-" for t in targets]
        lines.append(f"| {name} | {' | '.join(cells)} | {counted(kind, m, hopper):.2f} |")
    return lines


def times_table() -> list[str]:
    lines = [f"| | M | {' | '.join(GPUS)} |", "| --- | --- |" + " --- |" * len(GPUS)]
    for kind, m in CASES:
        cells = []
        for device in GPUS:
            r = roof(device, kind, N, K, m)
            cells.append(f"{1e6 * r.seconds:.1f} {r.bound}, {float16_seconds(device, N, K, m) / r.seconds:.2f}x")
        lines.append(f"| {'w4a16, gemv' if kind == 'gemv' else kind} | {m} | {' | '.join(cells)} |")
    return lines


def anchors_table() -> list[str]:
    lines = [
        "| GPU | kernel | N x K | M | published | predicted at best | by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for device, kind, shapes, m, unit, published, who in ANCHORS:
        roofs = [roof(device, kind, n, k, m) for n, k in shapes]
        seconds, bound = sum(r.seconds for r in roofs), max(roofs, key=lambda r: r.seconds).bound
        half = sum(float16_seconds(device, n, k, m) for n, k in shapes)
        said, ours = (
            (f"{published}x", f"{half / seconds:.2f}x")
            if unit == "x"
            else (f"{published} us", f"{1e6 * seconds:.1f} us")
        )
        shape = ", ".join(f"{n} x {k}" for n, k in shapes)
        lines.append(f"| {device} | {kind} | {shape} | {m} | {said} | {ours}, {bound} | {who} |")
    return lines


LAYERS = {"Mixtral 8x7B": (8, 2, 4096, 14336), "Qwen3 30B-A3B": (128, 8, 2048, 768), "gpt-oss 20B": (32, 4, 2880, 2880)}


def experts_roof(device: str, kind: str, layer: tuple[int, int, int, int], tokens: int) -> Roof:
    """The least time of an expert layer whose router is uniform (csrc/cuda/moe_experts.c chooses the tile by its rows an expert)."""
    row = next(d for d in catalog.list_devices() if d["name"] == device)
    experts, top_k, hidden, width = layer
    touched = experts * (1 - (1 - top_k / experts) ** tokens)
    block_m = next(b for b in (16, 32, 64) if tokens * top_k // experts <= b or b == 64)
    row_blocks = max(1.0, tokens * top_k / touched / block_m)
    weights, lanes = touched * 1.5 * hidden * width, 2 if kind == "w4a16" else 1
    moved = (
        weights * (1 + 4 / GROUP) + tokens * hidden * (lanes + 4) + tokens * top_k * (width * (lanes + 4) + 8 * hidden)
    )
    name = f"assay_moe_experts_w4a16_f16_m{block_m}" if kind == "w4a16" else f"assay_moe_experts_w4a8_m{block_m}"
    peak = row["int8_ops_per_s" if kind == "w4a8" else "ops_per_s"]
    return Roof(
        moved / row["memory_bytes_per_s"],
        loop(name, TARGETS[device]).slots_per_byte * weights * row_blocks / (SCHEDULERS * row["multiprocessors"] * row["clock_hz"]),
        4 * weights * row_blocks * block_m / peak,
    )  # fmt: skip


def experts_table() -> list[str]:
    lines = [f"| layer | kernel | tokens | {' | '.join(GPUS)} |", "| --- | --- | --- |" + " --- |" * len(GPUS)]
    for title, layer in LAYERS.items():
        for kind, tokens in (("w4a16", 1), ("w4a16", 16), ("w4a16", 64), ("w4a8", 64), ("w4a8", 256)):
            roofs = [experts_roof(device, kind, layer, tokens) for device in GPUS]
            cells = [f"{1e6 * r.seconds:.1f} {r.bound}" for r in roofs]
            lines.append(f"| {title} | {kind} | {tokens} | {' | '.join(cells)} |")
    return lines


def readers_table() -> list[str]:
    """Kernels that read logits: memory alone bounds them, or a launch."""
    cases = (
        ("moe_route", "4096 tokens, 128 experts", 4096 * 128),
        ("verify", "64 requests, 4 drafts, 128256 tokens", 320 * 128256),
    )
    lines = [f"| call | of | {' | '.join(GPUS)} |", "| --- | --- |" + " --- |" * len(GPUS)]
    for call, what, logits in cases:
        bandwidths = [next(d for d in catalog.list_devices() if d["name"] == g)["memory_bytes_per_s"] for g in GPUS]
        cells = [f"{1e6 * 4 * logits / b:.1f}" for b in bandwidths]
        lines.append(f"| {call} | {what} | {' | '.join(cells)} |")
    return lines


TIMES = f"""
## N = K = {N}: microseconds at best, what bounds them, times float16

"""
BESIDE = """
## Beside published kernels

Other people's, measured by them on the hardware named; ours at best, predicted. "x" is times float16 of their library, against
times float16 at its own roofline. What is above ours is a limit of our design there, or of the datasheet's clock.

"""
EXPERTS = """
## Expert layers: microseconds at best

Uniform routing, groups of 128, by the same three; weights of the experts that are touched, once. The hidden rows and each choice's result are
written and read once.

"""
READERS = """
## Routing and verification: microseconds at best

float32 logits, each read once, at the datasheet's bandwidth; rows that are filtered, raced or resampled are read again. A launch or
two come on top, and are most of it at serving's sizes; sorting (`moe_align`) and trees are launches and latencies alone.

"""
REST = """
Published: vLLM's Marlin MoE on an H20 (4 TB/s) 0.144, 0.457 and 1.206 ms for 8 experts of 4096 x 14336, two a token, at M = 1, 16
and 64; 0.143, 1.395 and 2.973 ms for 256 of 7168 x 2048, eight a token (FlagGems PR 3609). 17.7 us for SGLang's
`moe_align_block_size` of 16 tokens, 64 experts, and 22.8 us of 256, on an H200 (SGLang PR 4327; vLLM's 20.3 and 65.4 us);
FlashInfer's sampling halves the time of sampling in vLLM on an H100 (flashinfer.ai, 2025-03-10).
"""


def report() -> str:
    head = HEAD.format(schedulers=SCHEDULERS, counted=COUNTED)
    parts = [
        head,
        loops_table(),
        TIMES,
        times_table(),
        BESIDE,
        anchors_table(),
        EXPERTS,
        experts_table(),
        READERS,
        readers_table(),
        REST,
    ]
    return "".join(part if isinstance(part, str) else "\n".join(part) + "\n" for part in parts)


if __name__ == "__main__":
    os.environ["ASSAY_CUDA_DRIVER"] = str(mock_driver.library())
    Path(sys.argv[1] if len(sys.argv) > 1 else REPORT).write_text(report())
