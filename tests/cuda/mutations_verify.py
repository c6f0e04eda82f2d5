"""Seeded bugs of mutants.py in draft trees and verification."""

from mutations import Mutation, Test

_ALL = "verify|tree_"
REJECTION = Test("test_verify.py", "test_random_requests and rejection", _ALL)
SPECINFER = Test("test_verify.py", "test_random_requests and specinfer", _ALL)
GUMBEL = Test("test_verify.py", "test_random_requests and gumbel", _ALL)
SAMPLED = Test("test_verify.py", "test_random_requests and sampled", _ALL)
POISON = Test("test_verify.py", "test_edges and poisoned", _ALL)
TEAMS = Test("test_verify.py", "test_the_size_of_a_team or test_a_team_needs", _ALL)
VALUES = Test("test_verify.py", "test_values_that", _ALL)
TREES = Test("test_tree.py", "test", "tree_")

MUTATIONS = [
    Mutation("chain_verify.cuh", "accepts where u q equals p or is below twice it",
             (("is_probability(q) && u * q < p;", "is_probability(q) && u * q < 2 * p;"),), REJECTION),
    Mutation("chain_verify.cuh", "the last position that fails decides",
             (("ptx::atomic_min(&s->stop, static_cast<int32_t>(j));", "s->stop = static_cast<int32_t>(j);"),), REJECTION),
    Mutation("verify_scan.cuh", "no barrier before the sum's lanes read the weights",
             (("    ptx::sync();\n    assay_cuda_block block = {largest, 0, 0, 0};",
               "    assay_cuda_block block = {largest, 0, 0, 0};"),), SAMPLED),
    Mutation("verify_scan.cuh", "a mask hides a NaN",
             (("if (flags & kRawNan) largest = not_a_number();", "if (flags & kNan) largest = not_a_number();"),), POISON),
    Mutation("verify_scan.cuh", "noise of odd tokens is that of even ones",
             (("race_try(&race, p.x[2], p.x[3], odd, token + 1);", "race_try(&race, p.x[0], p.x[1], odd, token + 1);"),), GUMBEL),
    Mutation("verify_filter.cuh", "ties beyond top_k are kept",
             (("reached = is_enough(s, before, target);", "reached = false;"),), SAMPLED),
    Mutation("verify_filter.cuh", "a carry is lost in a sum of masses",
             (("if (low) rest += ptx::atomic_add(&shared->histogram.limb[0][bucket], low) > ~low;",
               "if (low) ptx::atomic_add(&shared->histogram.limb[1][bucket], low);"),), SAMPLED),
    Mutation("verify_walk.cuh", "the leader does not wait for its team",
             (("while (ptx::ld_acquire(&(a.orders + r.b)->arrived) != expected) {", "while (expected == 0) {"),), TEAMS),
    Mutation("verify_walk.cuh", "blocks are shared out by a stride one too small",
             (("b += kWalkWarps * a.team) {", "b += kWalkWarps * a.team + 1) {"),), TEAMS),
    Mutation("verify_walk.cuh", "offsets are not looked at",
             (("    if (broken) ptx::atomic_or(&s->broken, 1u);\n", "    if (broken && !r.valid) ptx::atomic_or(&s->broken, 1u);\n"),),
             VALUES),
    Mutation("verify_rows.cuh", "a block's sixteen lanes are folded in another order",
             (("    lane += ptx::shfl_xor(lane, 8u);\n    lane += ptx::shfl_xor(lane, 4u);",
               "    lane += ptx::shfl_xor(lane, 4u);\n    lane += ptx::shfl_xor(lane, 8u);"),), SAMPLED),
    Mutation("tree_rules.cuh", "a rejected sibling's share is not taken off",
             (("        C += step;\n        total", "        total"),), SPECINFER),
    Mutation("tree_links.cuh", "depths are looked up over too few steps",
             (("round < 5", "round < 4"),), TREES),
    Mutation("build_tree.cuh", "any later sibling of the same token is named",
             (("static_cast<uint64_t>(row) << 32 | static_cast<uint32_t>(other)", "static_cast<uint64_t>(other) << 32 | row"),), TREES),
]  # fmt: skip
