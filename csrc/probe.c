/* The probes: what this machine can do at most, measured with the same threads and clock as the kernels. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "kernels.h"

#include <stdatomic.h>
#include <time.h>

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Reading is handed out in pieces small enough to balance and large enough that starting one costs nothing. */
enum { PIECE_BYTES = 256 << 10 };

typedef struct {
    const assay_probe_kernel *kernel;
    const uint8_t *buffer;
    size_t bytes, ahead;
    int64_t pieces;
    int64_t iterations;
    double (*loop)(int64_t iterations);
    _Atomic uint64_t sink;  /* keeps the work from being optimised away */
    _Atomic uint64_t ops;
} probe;

static void read_pieces(void *arg, int64_t begin, int64_t end) {
    probe *p = arg;
    uint64_t seen = 0;
    for (int64_t i = begin; i < end; i++) {
        const size_t at = (size_t)(i % p->pieces) * PIECE_BYTES;
        const size_t left = p->bytes - at;
        seen ^= p->kernel->read(p->buffer + at, left < PIECE_BYTES ? left : PIECE_BYTES, p->ahead);
    }
    atomic_fetch_xor(&p->sink, seen);
}

double assay_probe_read(const void *buffer, size_t bytes, int64_t repeats, int64_t ahead, int variant, int num_threads) {
    probe p = {.kernel = assay_select(ASSAY_OP_probe, variant), .buffer = buffer, .bytes = bytes, .ahead = (size_t)ahead};
    p.pieces = (int64_t)((bytes + PIECE_BYTES - 1) / PIECE_BYTES);
    if (!p.kernel || !buffer || !bytes || repeats < 1 || ahead < 0 || p.pieces > INT32_MAX / repeats) return -1;
    const double start = now_s();
    for (int64_t i = 0; i < repeats; i++)
        if (assay_parallel_for(read_pieces, &p, p.pieces, num_threads, 1)) return -1;
    return now_s() - start;
}

static void compute(void *arg, int64_t begin, int64_t end) {
    probe *p = arg;
    double ops = 0;
    for (int64_t i = begin; i < end; i++) ops += p->loop(p->iterations);
    atomic_fetch_add(&p->ops, (uint64_t)ops);
}

enum kind { INT8, FP32, EXPONENTIALS };

static double peak(int64_t iterations, int variant, int num_threads, enum kind kind, double *ops) {
    probe p = {.kernel = assay_select(ASSAY_OP_probe, variant), .iterations = iterations};
    if (!p.kernel || iterations < 1 || num_threads < 0 || !ops) return -1;
    p.loop = kind == INT8 ? p.kernel->int8 : kind == FP32 ? p.kernel->fp32 : p.kernel->exponentials;
    const int threads = num_threads ? num_threads : assay_num_threads();
    const double start = now_s();
    /* Sixteen units a thread: one that is held up for a moment leaves its units to the others. */
    if (assay_parallel_for(compute, &p, (int64_t)threads * 16, threads, 1)) return -1;
    const double time = now_s() - start;
    *ops = (double)atomic_load(&p.ops);
    return time;
}

double assay_probe_int8(int64_t iterations, int variant, int num_threads, double *ops) {
    return peak(iterations, variant, num_threads, INT8, ops);
}

double assay_probe_fp32(int64_t iterations, int variant, int num_threads, double *ops) {
    return peak(iterations, variant, num_threads, FP32, ops);
}

double assay_probe_exp(int64_t iterations, int variant, int num_threads, double *elements) {
    return peak(iterations, variant, num_threads, EXPONENTIALS, elements);
}
