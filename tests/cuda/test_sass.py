"""Machine code of every kernel for every target: instructions that must and must not be there, issue slots of the main loops.

What only a run would show otherwise: a spill, a division or a conversion in a main loop, loads that were split, tensor-core products
that wait for each other.
"""

import re

import cubin
import emulator
import pytest
import slots
from rooflines import REPORT

from assay.cuda import compile as nvrtc

# A warp's issue slots for a byte of INT4 weights in the main loop, groups of 128, by activations and rows; zero points (z) cost a
# load, shifts and ands more. What four schedulers have for a byte at the full speed of memory: 0.30 on an A100 (19.1 bytes/ns an SM at
# 1.41 GHz: 13.4 a clock), 0.29 on an H100, 1.3 and more on a 4090 or an L40S, 0.14 on a B200. So up to 32 rows the
# first two are bound by memory.
MOST = {
    "w4a16_gemv": 0.32, "w4a16_gemvz": 0.34,
    "w4a16_m16": 0.24, "w4a16_m16z": 0.26, "w4a16_m32": 0.30, "w4a16_m32z": 0.32, "w4a16_m64": 0.42, "w4a16_m64z": 0.44,
    "w4a8_m16": 0.17, "w4a8_m16z": 0.19, "w4a8_m32": 0.26, "w4a8_m32z": 0.28, "w4a8_m64": 0.40, "w4a8_m64z": 0.42,
    "w4a16_sm90a_m64": 0.18, "w4a16_sm90a_m64z": 0.19, "w4a16_sm90a_m128": 0.22, "w4a16_sm90a_m128z": 0.23,
}  # fmt: skip
# Of floating-point probabilities, which are summed in float64, and whose walk keeps structs in either memory.
DOUBLES = {"verify_scan", "verify_filter", "chain_verify", "tree_verify"}
LOCAL = r"(LDL|STL)\b"
DOUBLE = r"D(ADD|MUL|FMA|MNMX|SETP|MMA)\b|F2F\b|MUFU\.\w*64H"
GENERIC = r"(LD|ST|ATOM|RED)\.E\b(?!.*(GPU|SYS))"
PRODUCT = r"(HMMA|IMMA|HGMMA|UTC\w*MMA|QMMA)\b"
# In a main loop: divisions (MUFU.RCP, conversions to integers), waits for memory, results.
COSTLY = r"MUFU|F2I|I2F\.U|IMAD\.HI|MEMBAR|ATOM|RED\b|STG|LDG\.E\.128|ERRBAR"


@pytest.fixture(scope="module")
def code(images):
    """code(target): the blocks of each kernel."""
    if cubin.nvdisasm() is None:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    held = {}

    def of(target: str) -> dict[str, list[cubin.Block]]:
        if target not in held:
            held[target] = {}
            for image in images(target).values():
                held[target] |= cubin.disassemble(image.code)
        return held[target]

    return of


def count(blocks: list[cubin.Block], pattern: str) -> int:
    return sum(block.count(pattern) for block in blocks)


pytestmark = pytest.mark.timeout(900)
targets = pytest.mark.parametrize("target", nvrtc.TARGETS)


@targets
def test_no_kernel_uses_local_memory_or_doubles_that_it_should_not(code, target):
    kernels = {k.name for k in emulator.kernels().values() if target in nvrtc.targets_of(k.file)}
    assert set(code(target)) == kernels
    for name, blocks in code(target).items():
        found = {i.opcode for block in blocks for i in block.instructions}
        assert not [o for o in found if re.match(LOCAL, o)], name
        if emulator.kernels()[name].file not in DOUBLES:
            assert not [o for o in found if re.match(DOUBLE, o)], name
            assert not [o for o in found if re.match(GENERIC, o)], name


@targets
def test_products_are_the_tensor_core_s_of_the_format(code, target):
    for name, blocks in code(target).items():
        found = {i.opcode for block in blocks for i in block.instructions if re.match(PRODUCT, i.opcode)}
        rows = slots.rows_of(name)
        if "sm90a" in name:
            want = {f"HGMMA.64x{rows}x16.F32{'.BF16' if 'bf16' in name else ''}"}
        elif "w4a8" in name or name == "assay_probe_mma_s8":
            want = {"IMMA.16832.S8.S8"}
        elif "w4a16" in name or "probe_mma" in name:
            want = {f"HMMA.16816.F32{'.BF16' if 'bf16' in name else ''}"}
        else:
            want = set()
        assert found == want, name


@targets
def test_operands_come_by_whole_vectors(code, target):
    for name, blocks in code(target).items():
        if not slots.is_gemm(name):
            continue
        copies = {o for o in cubin.opcodes(blocks) if o.startswith("LDGSTS")}
        if "sm90a" in name:
            assert not copies, name
            assert count(blocks, r"UBLKCP\.S\.G") >= 3, name  # activations, weights, scales
            assert count(blocks, r"SYNCS\.PHASECHK") >= 2, name
            assert count(blocks, r"USETMAXREG") == 2, name
        elif "gemv" in name:
            assert not copies, name
            assert count(blocks, slots.STREAMED) >= 8, name  # four ahead, and four in the loop
        else:
            assert copies, name
            assert all(".BYPASS.128" in o for o in copies), name  # 16 bytes a thread, not through L1
            fragments = {o for o in cubin.opcodes(blocks) if o.startswith("LDSM")}
            assert fragments == {"LDSM.16.M88.4"}, name
    for name, opcode in {
        "assay_probe_read": r"LDG\.E\.128",
        "assay_probe_write": r"STG\.E\.128",
        "assay_probe_atomic": r"REDG?\.E\.ADD",
        "assay_moe_combine_4": r"LDG\.E\.128",
    }.items():
        assert count(code(target)[name], opcode), name


@targets
def test_main_loops_hold_nothing_but_their_work(code, target):
    for name, blocks in code(target).items():
        if not slots.is_gemm(name):
            continue
        kernel, rows = emulator.kernels()[name], slots.rows_of(name)
        loop = slots.main_loop(kernel, blocks)
        for turn in loop.turns:
            costly = {i.opcode for b in turn.blocks for i in b.instructions if re.match(COSTLY, i.opcode)}
            calls = [
                i for b in turn.blocks for i in b.instructions if i.opcode.startswith("CALL") and "$" in i.operands
            ]
            assert not calls, f"{name}: a call in the main loop"
            if "gemv" in name:
                costly -= {o for o in costly if o.startswith("LDG")}
            assert not costly, f"{name}: {costly}"
            barriers = turn.count(r"BAR\.SYNC")
            if "sm90a" in name:
                # Sixteen products wait together, four times: apart they would wait one by one.
                assert (barriers, turn.count("HGMMA"), turn.count(r"WARPGROUP\.DEPBAR")) == (0, 16, 4), name
            elif "gemv" in name:
                assert (barriers, turn.count("HMMA"), turn.count(r"LDS|STS")) == (0, 32, 0), name
            else:
                assert barriers == 1, name
                assert turn.count("[HI]MMA") == rows, name
                assert turn.count(r"LDSM") == rows // 4, name


@targets
def test_issue_slots_for_a_byte_of_weights_are_within_bounds(code, target):
    checked = set()
    for name, blocks in code(target).items():
        if slots.is_gemm(name):
            kind = re.sub(r"^assay_(moe_experts_)?|b?f16_(?=m|gemv)", "", name)
            loop = slots.main_loop(emulator.kernels()[name], blocks)
            assert loop.slots_per_byte <= MOST[kind], f"{name}: {loop.slots_per_byte:.3f} slots a byte"
            checked.add(kind)
    assert checked == {kind for kind in MOST if "sm90a" not in kind or target == "sm_90a"}


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90a", "sm_100a"])
def test_the_documented_predictions_are_of_this_code(code, target):
    """docs/cuda-rooflines.md, made by `python tests/cuda/rooflines.py`."""
    lines = [line.strip("| ").split(" | ") for line in REPORT.read_text().splitlines() if line.startswith("| ")]
    column = next(line.index(f"slots, {target}") for line in lines if "read" in line)
    rows = {line[0]: line[column] for line in lines if line[0].startswith("assay_") and line[column] != "-"}
    assert len(rows) >= 7
    for name, documented in rows.items():
        loop = slots.main_loop(emulator.kernels()[name], code(target)[name])
        assert f"{loop.slots_per_byte:.3f}" == documented, name


@targets
def test_the_probe_of_tensor_cores_issues_little_else(code, target):
    for kind in ("f16", "bf16", "s8"):
        turns = cubin.turns(code(target)[f"assay_probe_mma_{kind}"], PRODUCT, r"EXIT", ())
        (turn,) = turns.values()
        assert turn.count(PRODUCT) == 8
        # A partition's tensor core takes at least 4 clocks for a product of 2048 or 4096, on every target.
        assert turn.slots <= 3 * 8, f"{kind}: {turn.slots}"


# ---- what reads the code ------------------------------------------------------------------------------------------------

LOOP = """\t.section\t.text.k,"ax",@progbits
        /*0000*/                   MOV R0, c[0x0][0x160] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P1 BRA `(.L_x_1) ;
        /*0030*/                   FFMA R1, R4, R5, R1 ;
        /*0040*/                   FFMA R1, R6, R7, R1 ;
.L_x_1:
        /*0050*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0060*/               @P0 BRA P3, `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""


def test_turns_of_a_loop_are_told_apart():
    blocks = cubin._blocks(LOOP)
    turns = cubin.turns(blocks, "HMMA", "STL", ("FFMA",))
    assert {kind: turn.slots for kind, turn in turns.items()} == {(0,): 4, (2,): 6}
    assert cubin.turns(blocks, "HMMA", "FFMA", ("FFMA",)).keys() == {(0,)}
    assert cubin.turns(blocks, "IMMA", "STL", ("FFMA",)) == {}


def test_a_loop_without_the_expected_turn_is_named():
    kernel = emulator.kernels()["assay_w4a8_m16"]
    with pytest.raises(LookupError, match="no turn with"):
        slots.main_loop(kernel, cubin._blocks(LOOP))
