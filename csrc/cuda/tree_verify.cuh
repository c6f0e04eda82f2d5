// Verification of trees, and of chains by the rules that look at more than one position at a time (BLOCK with q, TYPICAL, KSEQ,
// TRAVERSAL): the walk of csrc/spec_rules.c by one warp, over rows that all warps have settled before.
#ifndef ASSAY_CUDA_TREE_VERIFY_CUH
#define ASSAY_CUDA_TREE_VERIFY_CUH

#include "tree_links.cuh"
#include "tree_rules.cuh"

namespace assay {

// By a warp: links the request's nodes. A row status: of the first fault.
ASSAY_DEVICE int32_t link_request(const VerifyArgs &a, const Request &r) {
    assay_cuda_node *nodes = nodes_of(a, r);
    const int32_t lane = static_cast<int32_t>(ptx::lane());
    if (lane == 0) nodes[0] = assay_cuda_node{};
    ptx::sync_warp();
    for (int64_t base = 0; base < r.drafts; base += 32) {
        const int64_t j = base + lane;
        const bool valid = j < r.drafts;
        const int32_t id = valid ? id_of(a, r, j + 1) : -1;
        const int64_t parent = valid ? parent_of(a, r.first, j + 1) - 1 : -1;
        const bool stray = valid && parent >= j;
        const Depth d = depth_in_step(base, stray ? -1 : parent, id == -1, [&](int64_t up) {
            return Depth{nodes[up + 1].depth, nodes[up + 1].parent < 0};
        });
        const uint32_t strays = ptx::ballot(stray), bad_ids = ptx::ballot(valid && !d.absent && id < -1);
        if (strays | bad_ids) {
            const uint32_t at = ptx::ctz(strays | bad_ids);
            return strays >> at & 1 ? ASSAY_ROW_BAD_TREE : ASSAY_ROW_BAD_ID;
        }
        const int32_t self = static_cast<int32_t>(j) + 1, above = d.absent ? -1 : static_cast<int32_t>(parent) + 1;
        assay_cuda_node node = {};
        node.parent = above;
        node.depth = d.depth;
        if (valid) nodes[self] = node;
        ptx::sync_warp();
        // Among what the step holds of one parent: the oldest continues its list, the youngest ends it.
        const Siblings s = siblings_in_step(static_cast<uint32_t>(above < 0 ? -1 - lane : above));
        const bool first = above >= 0 && s.before < 0, last = above >= 0 && s.after < 0;
        const uint32_t older = ptx::popc(s.all & ((1u << lane) - 1));
        const int32_t before = above >= 0 ? nodes[above].last_child : 0, count = above >= 0 ? nodes[above].children : 0;
        ptx::sync_warp();
        if (above >= 0) {
            nodes[self].rank = count + static_cast<int32_t>(older);
            nodes[self].next_sibling = s.after < 0 ? 0 : static_cast<int32_t>(base) + s.after + 1;
        }
        if (first && before) nodes[before].next_sibling = self;
        if (first && !before) nodes[above].first_child = self;
        if (last) {
            nodes[above].last_child = self;
            nodes[above].children = count + static_cast<int32_t>(ptx::popc(s.all));
        }
        ptx::sync_warp();
    }
    return ASSAY_ROW_OK;
}

ASSAY_DEVICE void tree_verify(const VerifyArgs &a) {
    WalkShared *s = walk_shared();
    const Team team = join_team(a);
    const Request r = request_at(a, team.request);
    const bool teamed = needs_team(a, r);
    if (team.part) {
        if (teamed) serve(a, r, team.part);
        return;
    }
    const bool sound = begin_walk(a, r);
    if (ptx::warp() == 0) {
        const int32_t status = sound ? link_request(a, r) : ASSAY_ROW_BAD_REQUEST;
        if (ptx::lane() == 0) s->status = status;
    }
    ptx::sync();
    const bool walked = !s->status && r.most > 0;
    const assay_cuda_node *nodes = nodes_of(a, r);
    for (int64_t node = ptx::warp(); walked && node <= r.drafts; node += kWalkWarps)
        if (nodes[node].parent >= 0) settle_row(a, r, node, nodes[node].depth);
    ptx::sync();
    Walk w = {};
    if (ptx::warp() == 0) {
        int32_t accepted = 0, status = s->status;
        if (walked) status = walk(a, r, &w, &accepted);
        if (teamed) give_order(a, r, &w.lead, kOrderEnd, 0, Residual{});
        ptx::sync_warp();
        if (ptx::lane() == 0) {
            s->status = status;
            s->accepted = accepted;
            s->zero_drafts = static_cast<uint32_t>(w.zero_drafts);
        }
    } else if (teamed) {
        serve(a, r, 0);
    }
    conclude(a, r, walked, w.lead);
}

}  // namespace assay

#endif
