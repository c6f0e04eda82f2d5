"""The seeded bugs of mutants.py: edits of kernel files, and the tests that should catch them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Test:
    file: str  # of tests/cuda
    selection: str  # pytest's -k
    kernels: str  # a regular expression of the kernels that it needs


@dataclass(frozen=True)
class Mutation:
    file: str  # of csrc/cuda
    name: str
    edits: tuple[tuple[str, str], ...]
    test: Test
    times: int = 1  # how often each old text is in the file


A16 = Test("test_gemm_w4a16.py", "test_every_instance and f16-16-False and not bf16", "_f16_m16z$")
A16_GROUPS = Test("test_gemm_w4a16.py", "test_shapes and (15-255-384 or 5-20) and False", "_b?f16_m16z$")
A16_ROWS = Test("test_gemm_w4a16.py", "test_shapes and 17-257 and True", "_b?f16_m32$")
A16_TRAFFIC = Test("test_gemm_w4a16.py", "test_traffic and 7-300 and True", "_f16_m16$")
A16_STRIPES = Test("test_gemm_w4a16.py", "test_stripes and (128-3 or 32-5)", "_f16_m16z?$")
A8 = Test(
    "test_gemm_w4a8.py",
    "(test_shapes and (3-33 or 15-255 or 5-20) and False) or test_a_row_with",
    "a8_quantize|w4a8_m16z?$",
)
A8_STRIPES = Test("test_gemm_w4a8.py", "test_stripes and 2-900-900-False", "a8_quantize|w4a8_m16z$")
GEMV = Test("test_gemv.py", "test_shapes and (2-33 or 7-96 or 4-70) and not bf16", "_f16_gemvz?$")
GEMV_TRAFFIC = Test("test_gemv.py", "test_traffic", "_f16_gemv$")
HOPPER = Test(
    "test_gemm_sm90a.py",
    "(test_every_instance and 64 and not bf16) or (test_shapes and 66-33)",
    "a16_tiles|_f16_m64z?$",
)
HOPPER_LONG = Test("test_gemm_sm90a.py", "test_shapes and 64-256-640", "a16_tiles|_f16_m64z?$")

MUTATIONS = [
    Mutation("w4_tile.cuh", "no barrier in the main loop",
             (("        ptx::sync();   // stage t has landed for all, and all are done with stage t - 1\n", ""),), A16),
    Mutation("w4_tile.cuh", "waits for one stage too few",
             (("ptx::cp_async_wait<STAGES - 2>();", "ptx::cp_async_wait<STAGES - 1>();"),), A16),
    Mutation("w4_tile.cuh", "prefetches into the stage in use",
             (("load(t + STAGES - 1, free_stage)", "load(t + STAGES - 1, stage)"),), A16_GROUPS),
    Mutation("w4_tile.cuh", "copies never committed",
             (("load(t + STAGES - 1, free_stage);\n        ptx::cp_async_commit();",
               "load(t + STAGES - 1, free_stage);"),), A16_GROUPS),
    Mutation("w4_tile.cuh", "swizzle on one side only",
             (("a + row * 128 + ((column ^ (row & 7)) * 16)", "a + row * 128 + column * 16"),), A16),
    Mutation("w4_tile.cuh", "no swizzle at all: right, but with bank conflicts",
             (("a + row * 128 + ((column ^ (row & 7)) * 16)", "a + row * 128 + column * 16"),
              ("(((4 * step + 2 * i + half) ^ (row & 7)) * 16)", "((4 * step + 2 * i + half) * 16)")), A16_TRAFFIC),
    Mutation("w4_tile.cuh", "wrong shift to a word's upper fields", (("s ? word >> 8 : word", "s ? word >> 4 : word"),), A16),
    Mutation("w4_tile.cuh", "zero point of the upper field off by a power",
             (("lo = 0x64006400u + zero * 0x00010001u;   // 1024 + zero\n        hi = 0xD400D400u + zero * 0x00100010u;",
               "lo = 0x64006400u + zero * 0x00010001u;   // 1024 + zero\n        hi = 0xD400D400u + zero * 0x00200020u;"),), A16),
    Mutation("w4_tile.cuh", "bfloat16's zero point off by one",
             (("lo = 0xC300C300u + zero", "lo = 0xC301C301u + zero"),), A16_GROUPS),
    Mutation("w4_tile.cuh", "zero point of another column",
             (("format[j].set_zero(ZEROS ? zeros >> (8 * j) & 15 : 8)", "format[j].set_zero(ZEROS ? zeros >> (8 * (j ^ 1)) & 15 : 8)"),),
             A16),
    Mutation("w4_tile.cuh", "scales of neighbouring columns swapped", (("e & 1 ? odd : even", "e & 1 ? even : odd"),), A16),
    Mutation("w4_tile.cuh", "a group's sum is not cleared",
             (("f[m][j][e]);\n        }\n        w4_clear(p);", "f[m][j][e]);\n        }"),), A16_GROUPS),
    Mutation("w4_tile.cuh", "a group ends a tile late",
             (("return ((t + 1) & mask) == 0;", "return (t & mask) == 0;"),), A16_GROUPS),
    Mutation("w4_tile.cuh", "reads past the last k of an unaligned row",
             (("row && at + 2 * i + 1 < k", "row && at + 2 * i + 1 <= k"),),
             Test("test_gemm_w4a16.py", "test_shapes and 7-64-37 and True", "_b?f16_m16$")),
    Mutation("w4a16_gemm.cuh", "rows of A are not bounded: right, but reads past the end",
             (("first_row + i < static_cast<uint32_t>(args.m) ? first_row + i : kNoRow", "first_row + i"),), A16_ROWS),
    Mutation("w4_split.cuh", "rows of C are not bounded", (("row >= static_cast<uint32_t>(args.m) || ", ""),), A16_ROWS),
    Mutation("w4_split.cuh", "columns of C are not bounded", ((" || column >= static_cast<uint32_t>(args.w.n)", ""),), A16_ROWS),
    Mutation("w4_split.cuh", "one contributor is not added", (("block <= last_block; block++", "block < last_block; block++"),), A16_STRIPES),
    Mutation("w4_split.cuh", "arrivals are not reset", (("        if (last) ptx::st(arrivals, 0u);   // as the next launch wants it\n", ""),),
             A16_STRIPES),
    Mutation("w4_split.cuh", "arrives before all threads have stored",
             (("    ptx::fence_device();\n    ptx::sync();\n    uint32_t *const arrivals", "    uint32_t *const arrivals"),), A16_STRIPES),
    Mutation("w4_split.cuh", "both pieces of a stripe in one place", (("(block * stripe <= begin)", "0"),), A16_STRIPES),
    Mutation("w4_split.cuh", "adds in the order of arrival, own piece first",
             (("float sum[4] = {0, 0, 0, 0};", "float sum[4] = {v[0], v[1], v[2], v[3]};"),
              ("block <= last_block; block++) {", "block <= last_block; block++) {\n            if (block == ptx::bid_x()) continue;")),
             Test("test_gemm_w4a16.py", "test_stripes and (128-1 or 32-1)", "_f16_m16z?$")),
    Mutation("w4a8_tile.cuh", "zero point is not taken off", (("- zero * codes)", ")"),), A8),
    Mutation("w4a8_tile.cuh", "zero point taken off every piece of K", (("const bool later = s.groups", "const bool later = false && s.groups"),),
             A8_STRIPES),
    Mutation("w4a8_tile.cuh", "high and low fields swapped",
             (("{word[j] & 0x0F0F0F0Fu, word[j] >> 4 & 0x0F0F0F0Fu}", "{word[j] >> 4 & 0x0F0F0F0Fu, word[j] & 0x0F0F0F0Fu}"),), A8),
    Mutation("w4a8_tile.cuh", "scales rounded in another order",
             (("ptx::fma_rn(exact, ptx::mul_rn(s_w, s_a), f", "ptx::fma_rn(ptx::mul_rn(exact, s_w), s_a, f"),), A8),
    Mutation("a8_quantize.cuh", "codes in the order of k",
             (("at + 32 * block + 8 * h + 2 * t + 16 * (i % 2) + i / 2; };", "at + 32 * block + 16 * h + 4 * t + i; };"),), A8),
    Mutation("a8_quantize.cuh", "a group with an infinity gets a finite scale", (("const uint32_t scale = finite ?", "const uint32_t scale = true ?"),),
             A8),
    Mutation("a8_quantize.cuh", "multiplies by 1 / 127", (("ptx::div_rn(amax, 127.0f)", "ptx::mul_rn(amax, 1.0f / 127.0f)"),), A8),
    Mutation("w4a16_gemv.cuh", "no barrier before the shares are added",
             (("        ptx::sync();\n        float sum = 0;", "        float sum = 0;"),), GEMV),
    Mutation("w4a16_gemv.cuh", "weights fetched one step too far",
             (("if (step + i + kAhead < last)", "if (step + i + kAhead <= last)"),), GEMV_TRAFFIC),
    Mutation("w4a16_gemv.cuh", "a share's last group is not folded",
             (("step + i + 1 == last || groups.ends(step + i)", "groups.ends(step + i)"),), GEMV),
    Mutation("w4a16_sm90a.cuh", "waits for the wrong phase of a free stage",
             (("ptx::mbarrier_wait(empty(stage), parity ^ 1);", "ptx::mbarrier_wait(empty(stage), parity);"),), HOPPER),
    Mutation("w4a16_sm90a.cuh", "never waits for a free stage",
             (("            ptx::mbarrier_wait(empty(stage), parity ^ 1);\n", ""),), HOPPER_LONG),
    Mutation("w4a16_sm90a.cuh", "expects too few bytes", (("kABytes + tiles * (kWeightBytes", "tiles * (kWeightBytes"),), HOPPER),
    Mutation("w4a16_sm90a.cuh", "sums read before the products are done", (("                ptx::wgmma_wait<0>();\n", ""),), HOPPER),
    Mutation("w4a16_sm90a.cuh", "no fence before products", (("                ptx::wgmma_fence();\n", ""),), HOPPER),
    Mutation("w4a16_sm90a.cuh", "products step over k by half", (("at % 4 * 32)", "at % 4 * 16)"),), HOPPER),
    Mutation("w4a16_sm90a.cuh", "a stage is free when one warp has left it", (("ptx::mbarrier_init(empty(s), kConsumers / 32);", "ptx::mbarrier_init(empty(s), 1);"),),
             HOPPER_LONG),
    Mutation("w4a16_sm90a.cuh", "a stage is given back before it is read",
             (("            ptx::mbarrier_wait(full(stage), parity);\n",
               "            ptx::mbarrier_wait(full(stage), parity);\n            if (ptx::lane() == 0) ptx::mbarrier_arrive(empty(stage));\n"),
              ("            ptx::sync_warp();\n            if (ptx::lane() == 0) ptx::mbarrier_arrive(empty(stage));\n", "")), HOPPER_LONG),
    Mutation("w4a16_sm90a.cuh", "tiles of A are not swizzled", (("(column ^ (r % 8)) * 16", "column * 16"),), HOPPER),
]  # fmt: skip
