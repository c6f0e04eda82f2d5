"""Registers, shared memory and occupancy of every kernel on every target, as a table.

Usage: python tests/cuda/budgets.py [docs/cuda-budgets.md]

Compiles what the user's cache lacks of the present sources (two minutes on two cores), and writes the table, which
test_compile.py holds against the compiler: no kernel may need more registers than it says.
"""

import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import emulator
import occupancy

from assay.cuda import compile as nvrtc

REPORT = Path(__file__).resolve().parents[2] / "docs" / "cuda-budgets.md"
HEAD = """# Registers, shared memory and occupancy of the GPU's kernels

Made by `python tests/cuda/budgets.py` from what ptxas reports ({compiler}): no kernel spills or has a stack, on any
target. A cell is registers a thread / blocks that a multiprocessor holds, by the published limits of its architecture; shared
memory is the most that a launch asks for. A dash: not compiled for that target.

"""


def compiled(unit: str, target: str) -> nvrtc.Image:
    """Of the present sources, from the cache where it is there."""
    return nvrtc.compile_cached(emulator.CUDA.parent, unit, target, nvrtc.Compiler())


def compile_all(targets: tuple[str, ...]) -> dict[tuple[str, str], nvrtc.Image]:
    """By unit and target, in as many processes as there are CPUs."""
    work = [(u, t) for u in nvrtc.units(emulator.CUDA.parent) for t in targets if t in nvrtc.targets_of(u)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(work, pool.map(compiled, *zip(*work, strict=True)), strict=True))


def table() -> str:
    images = compile_all(nvrtc.TARGETS)
    usage = {(n, target): u for (_, target), image in images.items() for n, u in image.usage.items()}
    lines = [
        f"| kernel | threads | shared bytes | {' | '.join(nvrtc.TARGETS)} |",
        "| --- |" + " --- |" * (2 + len(nvrtc.TARGETS)),
    ]
    for k in emulator.kernels().values():
        cells = []
        for target in nvrtc.TARGETS:
            used = usage.get((k.name, target))
            fit = used and occupancy.blocks(target, used.registers, k.smem_bytes, k.threads)
            cells.append(f"{used.registers} / {fit}" if used else "-")
        lines.append(f"| {k.name} | {k.threads} | {k.smem_bytes} | {' | '.join(cells)} |")
    compiler = next(iter(images.values())).compiler
    return HEAD.format(compiler=compiler) + "\n".join(lines) + "\n"


def read() -> dict[str, dict[str, int]]:
    """Registers by kernel and target, from the table."""
    result = {}
    for line in REPORT.read_text().splitlines():
        if match := re.match(r"\| (assay_\w+) \| \d+ \| \d+ \| (.*) \|$", line):
            cells = match[2].split(" | ")
            result[match[1]] = {
                target: int(cell.split(" / ")[0])
                for target, cell in zip(nvrtc.TARGETS, cells, strict=True)
                if cell != "-"
            }
    return result


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else REPORT).write_text(table())
