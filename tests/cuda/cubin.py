"""What a cubin says of its kernels: arguments and resources from its ELF sections, machine code by nvdisasm, loops and their paths.

nvdisasm comes from `pip install nvidia-cuda-nvdisasm`; it needs neither a GPU nor a driver nor a toolkit.
"""

import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

# ---- ELF ------------------------------------------------------------------------------------------------------------

# EIATTR_*, the attributes of .nv.info sections: their numbers and payloads as `cuobjdump -elf` prints them.
PARAM_CBANK, KPARAM_INFO, CBANK_PARAM_SIZE = 0x0A, 0x17, 0x19
_NO_VALUE, _BYTE, _HALF, _SIZED = 1, 2, 3, 4  # EIFMT_*: how long an attribute is


@dataclass(frozen=True)
class Parameters:
    """How a kernel takes its arguments: the constant bank's bytes [offset, offset + size), and each argument's place there."""

    offset: int
    size: int
    arguments: tuple[tuple[int, int], ...]  # (offset from the first, bytes)


def sections(code: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit little-endian ELF file by name."""
    if code[:6] != b"\x7fELF\x02\x01":
        raise ValueError("expected a 64-bit little-endian ELF file")
    (start,) = struct.unpack_from("<Q", code, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", code, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", code, start + i * size) for i in range(count)]
    names = code[headers[names_at][4] :]
    return {
        names[h[0] : names.index(b"\0", h[0])].decode(): code[h[4] : h[4] + h[5]]
        for h in headers
        if h[1] != 8  # SHT_NOBITS holds nothing
    }


def attributes(info: bytes) -> list[tuple[int, bytes]]:
    """The (number, payload) of each attribute of a .nv.info section."""
    found, at = [], 0
    while at + 4 <= len(info):
        form, number, short = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED:
            found.append((number, info[at : at + short]))
            at += short
        elif form in {_NO_VALUE, _BYTE, _HALF}:
            found.append((number, struct.pack("<H", short)))
        else:
            raise ValueError(f"attribute {number:#x}: format {form} is unknown")
    return found


def parameters(code: bytes) -> dict[str, Parameters]:
    """By kernel."""
    result = {}
    for section, info in sections(code).items():
        if not section.startswith(".nv.info."):
            continue
        offset = size = None
        arguments = []
        for number, payload in attributes(info):
            if number == PARAM_CBANK:
                _, offset, size = struct.unpack("<IHH", payload)
            elif number == KPARAM_INFO:
                _, ordinal, at, packed = struct.unpack("<IHHI", payload)
                arguments.append((ordinal, at, packed >> 18))
        if offset is not None:
            result[section.removeprefix(".nv.info.")] = Parameters(
                offset, size, tuple((at, length) for _, at, length in sorted(arguments))
            )
    return result


# ---- machine code -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One issue slot. predicate: "@P0", "@!UP1" or ""; opcode: "HMMA.16816.F32"; operands: the rest."""

    predicate: str
    opcode: str
    operands: str


@dataclass
class Block:
    """Instructions that run one after another; where control goes then."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    def count(self, opcode: str) -> int:
        """How many opcodes match a regular expression from their begin."""
        return sum(re.match(opcode, i.opcode) is not None for i in self.instructions)


def nvdisasm() -> Path | None:
    """The disassembler of NVIDIA's wheel, else of a toolkit on PATH; None without either."""
    for folder in sys.path:
        for path in sorted(Path(folder or ".").glob("nvidia/*/bin/nvdisasm")):
            return path
    found = shutil.which("nvdisasm")
    return Path(found) if found else None


_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?(\w[\w.]*)\s*(.*?)\s*;\s*$")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


def disassemble(code: bytes) -> dict[str, list[Block]]:
    """The basic blocks of each kernel, in the order of their addresses; the first is entered."""
    tool = nvdisasm()
    if tool is None:
        raise FileNotFoundError("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: {done.stderr}")
    kernels = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", done.stdout, flags=re.M)[1:]:
        kernels[part[: part.index(",")].strip('"')] = _blocks(part)
    return kernels


def _blocks(text: str) -> list[Block]:
    blocks, labels, jumps = [Block()], {}, []
    for line in text.splitlines():
        if match := re.match(r"^(\.L_\w+):", line):
            if blocks[-1].instructions:
                _fall_through(blocks)
            labels[match[1]] = len(blocks) - 1
        elif match := _LINE.match(line):
            predicate, opcode, operands = match[1] or "", match[2], match[3]
            blocks[-1].instructions.append(Instruction(predicate, opcode, operands))
            base = opcode.split(".")[0]
            # A call of a label inside the kernel, under a predicate, is how ptxas writes some jumps.
            if base in {"BRA", "JMP", "BRX", "JMX"} or (base == "CALL" and _TARGET.search(operands)):
                targets = re.findall(r"\.L_\w+", operands)
                if not targets:
                    raise ValueError(f"{opcode} {operands}: a jump without a label")
                jumps += [(len(blocks) - 1, target) for target in targets]
                always = not predicate and (base in {"BRX", "JMX"} or _TARGET.fullmatch(operands))
                blocks.append(Block()) if always else _fall_through(blocks)
            elif base in {"EXIT", "RET", "BPT", "KILL"}:
                _fall_through(blocks) if predicate else blocks.append(Block())
    for block, label in jumps:
        blocks[block].next.append(labels[label])
    return blocks


def _fall_through(blocks: list[Block]) -> None:
    blocks[-1].next.append(len(blocks))
    blocks.append(Block())


def opcodes(blocks: list[Block]) -> Counter:
    """How often each opcode stands in a kernel."""
    return Counter(i.opcode for block in blocks for i in block.instructions)


# ---- loops ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One turn of a loop: its blocks in order."""

    blocks: tuple[Block, ...]

    @property
    def slots(self) -> int:
        """Instructions that a warp issues; those that their predicate turns off are issued too."""
        return sum(len(block.instructions) for block in self.blocks)

    def count(self, opcode: str) -> int:
        return sum(block.count(opcode) for block in self.blocks)


def turns(blocks: list[Block], within: str, without: str, by: tuple[str, ...]) -> dict[tuple[int, ...], Turn]:
    """The shortest turns of the loop in which most opcodes match `within`, by how many opcodes match each of `by` in them.

    A turn passes as many matches of `within` as any does, and no block with a match of `without`. Inner loops are passed once.
    """
    reach = _dominated(blocks)
    loops = defaultdict(set)
    for tail, block in enumerate(blocks):
        for head in block.next:
            if reach[tail] >> head & 1:
                loops[head].add(tail)
    best: tuple[int, dict[tuple[int, ...], Turn]] = (0, {})
    for head, tails in loops.items():
        found = _turns_from(blocks, head, tails, reach, within, without, by)
        if found[0] > best[0]:
            best = found
    return best[1]


def _dominated(blocks: list[Block]) -> list[int]:
    """Of each block, as bits of a number: the blocks that every way to it passes, itself too."""
    count = len(blocks)
    before = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for j in block.next:
            before[j].append(i)
    everything = (1 << count) - 1
    result = [1] + [everything] * (count - 1)
    changed = True
    while changed:
        changed = False
        for i in range(1, count):
            new = everything
            for p in before[i]:
                new &= result[p]
            new |= 1 << i
            if before[i] and new != result[i]:
                result[i], changed = new, True
    return result


def _turns_from(blocks, head, tails, reach, within, without, by) -> tuple[int, dict[tuple[int, ...], Turn]]:
    order, seen = [], set()

    def visit(at: int) -> None:
        stack = [(at, iter(blocks[at].next))]
        seen.add(at)
        while stack:
            node, rest = stack[-1]
            for j in rest:
                # Forward edges alone, among what the head dominates.
                if j not in seen and reach[j] >> head & 1 and not reach[node] >> j & 1:
                    seen.add(j)
                    stack.append((j, iter(blocks[j].next)))
                    break
            else:
                order.append(node)
                stack.pop()

    visit(head)
    # (matches of `by`) -> (matches of `within`, -slots, way), the best so far, from the head to each block.
    ways: dict[int, dict[tuple[int, ...], tuple[int, int, tuple[int, ...]]]] = {head: {(0,) * len(by): (0, 0, ())}}
    ends: dict[tuple[int, ...], tuple[int, int, tuple[int, ...]]] = {}
    for node in reversed(order):
        block = blocks[node]
        if block.count(without):
            continue
        for count, (matches, slots, way) in ways.get(node, {}).items():
            key = tuple(c + block.count(pattern) for c, pattern in zip(count, by, strict=True))
            here = (matches + block.count(within), slots - len(block.instructions), (*way, node))
            goals = [ends] if node in tails else []
            goals += [
                ways.setdefault(j, {}) for j in block.next if j in seen and j != head and not reach[node] >> j & 1
            ]
            for goal in goals:
                if key not in goal or here[:2] > goal[key][:2]:
                    goal[key] = here
    most = max((matches for matches, _, _ in ends.values()), default=0)
    return most, {
        key: Turn(tuple(blocks[i] for i in way)) for key, (matches, _, way) in ends.items() if matches == most and most
    }
