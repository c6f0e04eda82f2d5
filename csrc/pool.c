/* The thread pool: work is a range of units, each thread owns a contiguous share (one linear stream of
 * weights a thread) and steals single units from the far end of the others' shares when its own is done.
 *
 * A worker that is not there in time costs nothing: it enters a job by a compare-and-swap on the job word, the
 * caller closes the word when the units run out and waits only for workers that had entered. So a descheduled
 * worker delays nobody, which is what makes spinning bearable on a shared machine. Workers spin SPIN_NS after
 * their last job, then sleep on a condition variable: a parked worker costs its waker a system
 * call of several microseconds, so small jobs leave it asleep (`wake`).
 *
 * A woken worker tends to be put on its waker's CPU, where it waits while the waker does all the work alone: two threads as
 * fast as one, until the scheduler's next balancing. So workers are kept off the CPU that the caller is on (`keep_off`).
 *
 * Never two jobs at once: a call that finds the pool busy does its work alone. After fork the child has no
 * workers; its first call starts new ones. Nothing starts before the first call that wants threads. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "kernels.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 256, SPIN_NS = 200000, YIELD_NS = 20000 };

#if defined(__x86_64__) || defined(__i386__)
#define cpu_relax() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define cpu_relax() __asm__ volatile("yield")
#else
#define cpu_relax() ((void)0)
#endif

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- how many threads ---------------------------------------------------------------------------- */

/* Whole CPUs that the control groups leave this process, or a large number. */
static int quota_cpus(void) {
    const double quota = assay_cgroup_quota();
    if (quota <= 0 || quota >= MAX_THREADS) return MAX_THREADS;
    const int whole = (int)quota;
    return whole + (quota > whole);
}

int assay_num_threads(void) {
    const char *wanted = getenv("ASSAY_NUM_THREADS");
    if (wanted && *wanted) {
        char *end;
        long n = strtol(wanted, &end, 10);
        if (!*end && n >= 1) return n < MAX_THREADS ? (int)n : MAX_THREADS;
    }
    long n = 0;
#ifdef __linux__
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set)) n = CPU_COUNT(&set);
#endif
    if (n < 1) n = sysconf(_SC_NPROCESSORS_ONLN);
    if (n < 1) n = 1;
    /* Read once: it is several files too many for every GEMM. */
    static _Atomic int quota = 0;
    int q = atomic_load(&quota);
    if (!q) atomic_store(&quota, q = quota_cpus());
    if (n > q) n = q;
    return n < MAX_THREADS ? (int)n : MAX_THREADS;
}

/* ---- the job ------------------------------------------------------------------------------------- */

/* A thread's share of the units, [begin, end) in one word, so that owner and thief take by one CAS. */
typedef struct {
    _Alignas(64) _Atomic uint64_t range;
} share;

static struct {
    pthread_mutex_t busy;             /* held by the caller whose job runs */
    int workers;                      /* started; worker i is thread i + 1 of a job */
    pthread_t handles[MAX_THREADS];   /* of the workers, which never end */
    int avoided;                      /* the CPU that they are kept off; -1 none yet */
    /* epoch << 32 | closed << 31 | entered: what a worker reads to see, and to enter, a job */
    _Alignas(64) _Atomic uint64_t job;
    _Alignas(64) _Atomic uint32_t done;
    _Alignas(64) _Atomic int sleepers;
    pthread_mutex_t sleep_lock;
    pthread_cond_t sleep_cond;
    assay_range_fn fn;
    void *arg;
    int threads;
    share shares[MAX_THREADS];
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .sleep_lock = PTHREAD_MUTEX_INITIALIZER,
          .sleep_cond = PTHREAD_COND_INITIALIZER, .job = (uint64_t)1 << 31, .avoided = -1};

#define CLOSED ((uint64_t)1 << 31)
#define EPOCH(word) ((uint32_t)((word) >> 32))
#define ENTERED(word) ((uint32_t)((word) & (CLOSED - 1)))
#define RANGE(begin, end) ((uint64_t)(begin) << 32 | (uint32_t)(end))

/* Takes the first unit of a share (its owner) or the last (a thief). */
static int take(share *s, int own, int64_t *unit) {
    uint64_t word = atomic_load_explicit(&s->range, memory_order_relaxed);
    for (;;) {
        uint32_t begin = (uint32_t)(word >> 32), end = (uint32_t)word;
        if (begin >= end) return 0;
        uint64_t left = own ? RANGE(begin + 1, end) : RANGE(begin, end - 1);
        if (atomic_compare_exchange_weak_explicit(&s->range, &word, left, memory_order_acq_rel, memory_order_relaxed)) {
            *unit = own ? begin : end - 1;
            return 1;
        }
    }
}

static void work(int me) {
    int64_t unit;
    int threads = pool.threads;
    for (int i = 0; i < threads; i++) {
        share *s = &pool.shares[(me + i) % threads];
        while (take(s, i == 0, &unit)) pool.fn(pool.arg, unit, unit + 1);
    }
}

static void *worker(void *arg) {
    int me = (int)(intptr_t)arg;
    uint32_t seen = 0;
    int64_t idle_since = now_ns();
    for (;;) {
        uint64_t word = atomic_load_explicit(&pool.job, memory_order_acquire);
        if (EPOCH(word) != seen && !(word & CLOSED)) {
            if (!atomic_compare_exchange_weak_explicit(&pool.job, &word, word + 1, memory_order_acq_rel,
                                                       memory_order_relaxed))
                continue;
            seen = EPOCH(word);
            if (me < pool.threads) work(me);
            atomic_fetch_add_explicit(&pool.done, 1, memory_order_release);
            idle_since = now_ns();
            continue;
        }
        cpu_relax();
        if (now_ns() - idle_since < SPIN_NS) continue;
        pthread_mutex_lock(&pool.sleep_lock);
        atomic_fetch_add(&pool.sleepers, 1);
        for (;;) {
            word = atomic_load(&pool.job);
            if (EPOCH(word) != seen && !(word & CLOSED)) break;
            pthread_cond_wait(&pool.sleep_cond, &pool.sleep_lock);
        }
        atomic_fetch_sub(&pool.sleepers, 1);
        pthread_mutex_unlock(&pool.sleep_lock);
        idle_since = now_ns();
    }
    return NULL;
}

/* ---- fork ------------------------------------------------------------------------------------------ */

static void before_fork(void) {
    pthread_mutex_lock(&pool.busy);
    pthread_mutex_lock(&pool.sleep_lock);
}
static void after_fork_parent(void) {
    pthread_mutex_unlock(&pool.sleep_lock);
    pthread_mutex_unlock(&pool.busy);
}
static void after_fork_child(void) {
    pool.workers = 0;
    pool.avoided = -1;
    atomic_store(&pool.sleepers, 0);
    pthread_mutex_init(&pool.sleep_lock, NULL);
    pthread_cond_init(&pool.sleep_cond, NULL);
    pthread_mutex_init(&pool.busy, NULL);
}
static void install_fork_handlers(void) { pthread_atfork(before_fork, after_fork_parent, after_fork_child); }

/* Starts workers until there are `wanted`; fewer when the system gives no more. Signals stay with the caller's threads. */
static void start_workers(int wanted) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, install_fork_handlers);
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    while (pool.workers < wanted) {
        void *me = (void *)(intptr_t)(pool.workers + 1);
        if (pthread_create(&pool.handles[pool.workers], &attr, worker, me)) break;
        pool.workers++;
        pool.avoided = -1;
    }
    pthread_attr_destroy(&attr);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* Keeps the workers off the caller's CPU, within the caller's own affinity mask, where that leaves each a CPU of its own.
 * Two system calls and one a worker when the caller has moved; else one look at a shared page. */
static void keep_off(void) {
#ifdef __linux__
    const int cpu = sched_getcpu();
    cpu_set_t allowed;
    if (cpu < 0 || cpu == pool.avoided || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    if (CPU_COUNT(&allowed) > pool.workers) CPU_CLR(cpu, &allowed);
    for (int i = 0; i < pool.workers; i++) pthread_setaffinity_np(pool.handles[i], sizeof allowed, &allowed);
    pool.avoided = cpu;
#endif
}

/* ---- running a job ------------------------------------------------------------------------------------ */

int assay_parallel_for(assay_range_fn fn, void *arg, int64_t units, int num_threads, int wake) {
    if (units < 0 || units > UINT32_MAX - 1 || num_threads < 0) return ASSAY_EINVAL;
    int threads = num_threads ? num_threads : assay_num_threads();
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > units) threads = units > 0 ? (int)units : 1;
    if (threads == 1 || pthread_mutex_trylock(&pool.busy)) {
        if (units) fn(arg, 0, units);
        return ASSAY_OK;
    }
    if (pool.workers < threads - 1) start_workers(threads - 1);
    keep_off();

    pool.fn = fn;
    pool.arg = arg;
    pool.threads = threads;
    for (int i = 0; i < threads; i++)
        atomic_store_explicit(&pool.shares[i].range, RANGE(units * i / threads, units * (i + 1) / threads),
                              memory_order_relaxed);
    atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
    uint32_t epoch = EPOCH(atomic_load_explicit(&pool.job, memory_order_relaxed)) + 1;
    if (!epoch) epoch = 1; /* 0 is what a new worker has "seen" */
    atomic_store(&pool.job, (uint64_t)epoch << 32);
    if (wake && atomic_load(&pool.sleepers)) {
        pthread_mutex_lock(&pool.sleep_lock);
        pthread_cond_broadcast(&pool.sleep_cond);
        pthread_mutex_unlock(&pool.sleep_lock);
    }

    work(0);

    uint32_t entered = ENTERED(atomic_fetch_or(&pool.job, CLOSED));
    int64_t since = 0;
    for (int i = 0; atomic_load_explicit(&pool.done, memory_order_acquire) != entered; i++) {
        cpu_relax();
        if (i % 64 != 63) continue;
        int64_t t = now_ns();
        if (!since) since = t;
        /* The last worker may share this CPU with us: let it run rather than spin out a scheduler tick. */
        if (t - since > YIELD_NS) sched_yield();
    }
    pthread_mutex_unlock(&pool.busy);
    return ASSAY_OK;
}

/* Every unit waits (at most 1 ms) until all have begun: a dispatch that all threads really took part in. */
typedef struct {
    _Atomic int begun;
    int threads;
} rendezvous;

static void meet(void *arg, int64_t begin, int64_t end) {
    rendezvous *r = arg;
    atomic_fetch_add(&r->begun, (int)(end - begin));
    int64_t deadline = now_ns() + 1000000;
    while (atomic_load(&r->begun) < r->threads && now_ns() < deadline) cpu_relax();
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double assay_dispatch_latency(int num_threads, int repeats) {
    if (num_threads < 1 || repeats < 1 || repeats > 100000) return -1;
    double *times = malloc((size_t)repeats * sizeof *times);
    if (!times) return -1;
    for (int i = 0; i < repeats; i++) {
        rendezvous r = {0, num_threads};
        int64_t start = now_ns();
        assay_parallel_for(meet, &r, num_threads, num_threads, 1);
        times[i] = 1e-9 * (double)(now_ns() - start);
    }
    qsort(times, (size_t)repeats, sizeof *times, compare_doubles);
    double median = times[repeats / 2];
    free(times);
    return median;
}
