/* Sorting slots by expert on a GPU: checks, and into how many runs the slots are cut. */
#include "assay_cuda.h"

/* As in moe_align.cuh: warps a block, and of the block that does everything. */
enum { WARPS = 8, ONE_WARPS = 32 };
/* Most slots and shared memory of that block: beyond, three launches on many multiprocessors are sooner done. */
enum { ONE_SLOTS = 4096, ONE_BYTES = 98304 };
/* Shared memory of the others; most runs; most cells in the workspace (64 MiB). */
enum { BLOCK_BYTES = 65536, MOST_CHUNKS = 1024, MOST_CELLS = 1 << 24, LEAST_CHUNK = 128 };

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

int64_t assay_cuda_moe_align_most(int64_t slots, int64_t num_local, int64_t block_size) {
    if (slots < 0 || slots >= INT32_MAX || num_local < 0 || num_local > INT32_MAX || block_size < 1 || block_size > INT32_MAX)
        return -1;
    /* Every expert that has a slot is padded by at most block_size - 1. */
    const int64_t padded = min64(slots, num_local);
    const int64_t most = num_local ? (slots + padded * (block_size - 1)) / block_size * block_size : 0;
    return most < INT32_MAX ? most : -1;
}

static size_t one_bytes(const assay_cuda_align_args *a) {
    return 4 * (ONE_WARPS * ((size_t)a->num_local | 1) + (size_t)a->num_local + ONE_WARPS);
}

static int plan(assay_cuda_align_args *a) {
    const int64_t most = assay_cuda_moe_align_most(a->slots, a->num_local, a->block_size);
    if (most < 0 || a->num_experts < 1 || (!a->expert_map && a->num_local != a->num_experts)) return ASSAY_EINVAL;
    a->most = (int32_t)most;
    if (a->slots <= ONE_SLOTS && one_bytes(a) <= ONE_BYTES) {
        a->chunks = ONE_WARPS;
        a->chunk_slots = (int32_t)round_up(round_up(a->slots, ONE_WARPS) / ONE_WARPS, 32);
        return ASSAY_OK;
    }
    const int64_t room = min64(MOST_CHUNKS, MOST_CELLS / (a->num_local ? a->num_local : 1) / WARPS * WARPS);
    const int64_t runs = room < WARPS ? WARPS : room;
    int64_t size = round_up(((int64_t)a->slots + runs - 1) / runs, 32);
    if (size < LEAST_CHUNK) size = LEAST_CHUNK;
    a->chunk_slots = (int32_t)size;
    a->chunks = (int32_t)round_up((a->slots + size - 1) / size, WARPS);
    return ASSAY_OK;
}

size_t assay_cuda_moe_align_workspace(const assay_cuda_align_args *args) {
    if (!args) return 0;
    assay_cuda_align_args a = *args;
    if (plan(&a)) return 0;
    return 4 * (size_t)a.chunks * ((size_t)a.num_local + 1);
}

int assay_cuda_moe_align(const assay_cuda_align_args *args, void *workspace, size_t workspace_bytes, void *stream) {
    if (!args) return ASSAY_EINVAL;
    assay_cuda_align_args a = *args;
    if (plan(&a) || (a.slots && (!a.topk_ids || !a.position)) || (a.num_local && !a.counts) || !a.offsets ||
        !a.num_tokens_post_padded || (a.most && (!a.sorted_token_ids || !a.expert_ids)))
        return ASSAY_EINVAL;
    if (a.slots <= ONE_SLOTS && one_bytes(&a) <= ONE_BYTES)
        return assay_cuda_launch("assay_moe_align_one", 1, 1, 1, one_bytes(&a), stream, &a, sizeof a);
    if (!workspace || workspace_bytes < assay_cuda_moe_align_workspace(args)) return ASSAY_EWORKSPACE;
    a.cells = workspace;
    const unsigned blocks = (unsigned)(a.chunks / WARPS);
    const size_t cells = 4 * WARPS * ((size_t)a.num_local | 1), words = 4 * WARPS;
    const int shared = cells + words <= BLOCK_BYTES;
    int status = assay_cuda_launch(shared ? "assay_moe_align_count" : "assay_moe_align_count_stored", blocks, 1, 1,
                                   shared ? cells : 0, stream, &a, sizeof a);
    if (!status)
        status = assay_cuda_launch("assay_moe_align_scan", (unsigned)((a.num_local + WARPS - 1) / WARPS), 1, 1, 0, stream, &a,
                                   sizeof a);
    if (!status)
        status = assay_cuda_launch(shared ? "assay_moe_align_scatter" : "assay_moe_align_scatter_stored", blocks, 1, 1,
                                   words + (shared ? cells : 0), stream, &a, sizeof a);
    return status;
}
