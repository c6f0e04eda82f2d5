/* Stands between moe_experts.c, which is compiled with assay_select renamed to counted_select, and the GEMM kernels: writes down
 * which tiles of weights each of its products reads, in the order of each thread. */
#include "kernels.h"

#include <pthread.h>
#include <stdatomic.h>

enum { ROOM = 1 << 16 };
static struct { int64_t at, bytes, thread; } reads[ROOM];
static _Atomic int64_t count;
static assay_int4_gemm_kernel counted;
static const assay_int4_gemm_kernel *real;

static void note(const assay_gemm_args *g, int64_t begin, int64_t end) {
    const int64_t i = atomic_fetch_add(&count, 1);
    if (i >= ROOM) return;
    reads[i].at = (int64_t)(intptr_t)g->packed + begin * g->l.tile_bytes;
    reads[i].bytes = (end - begin) * g->l.tile_bytes;
    reads[i].thread = (int64_t)pthread_self();
}

static void w4a8(const assay_gemm_args *g, int64_t begin, int64_t end) {
    note(g, begin, end);
    real->w4a8(g, begin, end);
}

static void w4a16(const assay_gemm_args *g, int64_t begin, int64_t end) {
    note(g, begin, end);
    real->w4a16(g, begin, end);
}

const void *counted_select(int op, int variant) {
    const void *found = assay_select(op, variant);
    if (op != ASSAY_OP_int4_gemm || !found) return found;
    real = found;
    counted = *real;
    counted.w4a8 = w4a8;
    counted.w4a16 = w4a16;
    return &counted;
}

/* Reads since the last call: address, bytes and thread of each into out[3 * i ...]; returns how many there were. */
int64_t counted_reads(int64_t *out, int64_t room) {
    const int64_t n = atomic_exchange(&count, 0);
    for (int64_t i = 0; i < n && i < ROOM && i < room; i++) {
        out[3 * i] = reads[i].at;
        out[3 * i + 1] = reads[i].bytes;
        out[3 * i + 2] = reads[i].thread;
    }
    return n;
}
