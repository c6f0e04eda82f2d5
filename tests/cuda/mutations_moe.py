"""Seeded bugs of mutants.py in routing, sorting, experts and combining."""

from mutations import Mutation, Test

ROUTE = Test("test_route.py", "test_every_instance_routes_alike and 64-", "moe_route_64$")
GROUPS = Test("test_route.py", "test_groups_of_every_size and 8", "moe_route")
EXTREMES = Test("test_route.py", "test_extreme or test_a_bias or test_every_size", "moe_route")
ALIGN = Test("test_align.py", "(test_equals and (33-2-7 or 100-6-160)) or test_the_order", "moe_align")
COMBINE = Test("test_align.py", "test_combine", "moe_combine")
EXPERTS = Test(
    "test_experts.py", "test_every_instance and f16-16 and not bf16", "moe_(combine_1|experts_w4a16_f16_m16z?)$"
)
CUTS = Test(
    "test_experts.py", "test_few_threads and f16 or test_cuts_of_k and f16", "moe_(combine_1|experts_w4a16_f16_m16z?)$"
)

MUTATIONS = [
    Mutation("moe_route.cuh", "ties go to the higher expert",
             (("ptx::redux_min(best == top ? 32 * at + ptx::lane() : ~0u)", "ptx::redux_max(best == top ? 32 * at + ptx::lane() : 0u)"),),
             EXTREMES),
    Mutation("moe_route.cuh", "the chosen expert is not struck out",
             (("        if (32 * r + ptx::lane() == id) key.put(r, NONE);", "        if (32 * r + ptx::lane() == id) key.put(r, key.get(r));"),),
             ROUTE),
    Mutation("moe_route.cuh", "one lane's addend is left out of sums",
             (("ptx::add_rn(sum, ptx::shfl_down(addend, 16))", "ptx::add_rn(sum, ptx::shfl_down(addend, 15))"),), ROUTE),
    Mutation("moe_route.cuh", "a group's worth is read before it is written",
             (("both ? ordered(ptx::add_rn(value_of(best.first), value_of(best.second))) : best.first);\n    }\n    ptx::sync_warp();",
               "both ? ordered(ptx::add_rn(value_of(best.first), value_of(best.second))) : best.first);\n    }"),), GROUPS),
    Mutation("moe_route.cuh", "equal groups go to the later one",
             (("(other == own && h < g)", "(other == own && h > g)"),), GROUPS),
    Mutation("moe_align.cuh", "slots of one expert in one step share a place",
             (("first + ptx::popc(same & below);", "first;"),), ALIGN),
    Mutation("moe_align.cuh", "a cell is overwritten before all its lanes have read it",
             (("        const uint32_t first = e < 0 ? 0 : cells.get(e);\n        ptx::sync_warp();\n",
               "        const uint32_t first = e < 0 ? 0 : cells.get(e);\n"),), ALIGN),
    Mutation("moe_align.cuh", "padding is one slot short",
             (("for (uint32_t i = offset + n; i < end; i++)", "for (uint32_t i = offset + n + 1; i < end; i++)"),), ALIGN),
    Mutation("moe_align.cuh", "a block's warps do not wait for each other's sums",
             (("        if (!ptx::lane()) ptx::sts(words + ptx::warp(), sum);\n        ptx::sync();\n",
               "        if (!ptx::lane()) ptx::sts(words + ptx::warp(), sum);\n"),), ALIGN),
    Mutation("moe_combine.cuh", "the first slot is added to zero: other bits for minus zero and by one rounding",
             (("more ? ptx::fma_rn(w, y[i], sum[i]) : ptx::mul_rn(w, y[i])", "ptx::add_rn(sum[i], ptx::mul_rn(w, y[i]))"),), COMBINE),
    Mutation("moe_combine.cuh", "columns past the end are stored", (("    if (column >= a.n) return;\n", ""),), COMBINE),
    Mutation("moe_experts.cuh", "gates and ups are exchanged",
             (("assay_gated_unit(a.activation, a.alpha, a.limit, v[e], v[2 + e])", "assay_gated_unit(a.activation, a.alpha, a.limit, v[2 + e], v[e])"),),
             EXPERTS),
    Mutation("moe_experts.cuh", "padding rows are taken for slots",
             (("return slot < static_cast<uint32_t>(a.slots) ? slot : kNoRow;", "return slot;"),), EXPERTS),
    Mutation("moe_experts.cuh", "the last cut of K is not waited for",
             (("before == splits - 1 ? 1u : 0u", "before == splits - 2 ? 1u : 0u"),), CUTS),
]  # fmt: skip
