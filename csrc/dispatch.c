/* Run-time dispatch: which variant of an op runs. */
#include "kernels.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#ifndef ASSAY_VERSION
#define ASSAY_VERSION "0+unknown"
#endif

/* CMake defines ASSAY_COMPILED_<isa> for each tier whose files are in this build. */
#ifndef ASSAY_COMPILED_neon
#define ASSAY_COMPILED_neon 0
#endif
#ifndef ASSAY_COMPILED_neondot
#define ASSAY_COMPILED_neondot 0
#endif
#ifndef ASSAY_COMPILED_avx2
#define ASSAY_COMPILED_avx2 0
#endif
#ifndef ASSAY_COMPILED_avxvnni
#define ASSAY_COMPILED_avxvnni 0
#endif
#ifndef ASSAY_COMPILED_avx512vnni
#define ASSAY_COMPILED_avx512vnni 0
#endif
#ifndef ASSAY_COMPILED_avx512bf16
#define ASSAY_COMPILED_avx512bf16 0
#endif
#ifndef ASSAY_COMPILED_amx
#define ASSAY_COMPILED_amx 0
#endif
#define ASSAY_COMPILED_scalar 1

#define VARIANT(op, isa) extern const assay_##op##_kernel assay_##op##_##isa;
#include "cpu/spec_verify/spec_verify.h"
#include "variants.inc"
#undef VARIANT

#define ISA(name, features) {#name, features, ASSAY_COMPILED_##name},
static const struct { const char *name, *features; int compiled; } tiers[] = {
#include "isa.inc"
};
#undef ISA

/* The table's address where its tier is in the build, else NULL. */
#define TABLE_1(table) &table
#define TABLE_0(table) NULL
#define TABLE_OF(compiled, table) PASTE(TABLE_, compiled)(table)
#define PASTE(a, b) a##b
#define VARIANT(op, isa) {ASSAY_OP_##op, #op, ASSAY_ISA_##isa, #isa, TABLE_OF(ASSAY_COMPILED_##isa, assay_##op##_##isa)},
static const struct { int op; const char *op_name; int isa; const char *isa_name; const void *kernel; } variants[] = {
#include "variants.inc"
};
#undef VARIANT
enum { VARIANTS = sizeof variants / sizeof *variants };

const char *assay_version(void) { return ASSAY_VERSION; }

const char *assay_compiler(void) {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#else
    return "unknown";
#endif
}

/* The highest tier that ASSAY_ISA allows: -2 not read yet, -1 the variable names nothing usable. */
static _Atomic int cap = -2;

int assay_isa_refresh(void) {
    const char *wanted = getenv("ASSAY_ISA");
    int found = ASSAY_ISA_COUNT - 1;
    if (wanted && *wanted) {
        found = -1;
        for (int i = 0; i < ASSAY_ISA_COUNT; i++)
            if (!strcmp(wanted, tiers[i].name) && tiers[i].compiled && assay_cpu_supports(i)) found = i;
    }
    atomic_store(&cap, found);
    return found < 0 ? ASSAY_EISA : ASSAY_OK;
}

static int isa_cap(void) {
    int c = atomic_load(&cap);
    if (c == -2) {
        assay_isa_refresh();
        c = atomic_load(&cap);
    }
    return c;
}

const void *assay_select(int op, int isa) {
    int highest = isa_cap();
    for (int i = 0; i < VARIANTS; i++) {
        if (variants[i].op != op || !variants[i].kernel || variants[i].isa > highest) continue;
        if (assay_cpu_supports(variants[i].isa) && (isa < 0 || isa == variants[i].isa)) return variants[i].kernel;
    }
    return NULL;
}

int assay_isa_count(void) { return ASSAY_ISA_COUNT; }

int assay_isa_info(int i, const char **name, const char **features, int *supported, int *allowed) {
    if (i < 0 || i >= ASSAY_ISA_COUNT) return ASSAY_EINVAL;
    *name = tiers[i].name;
    *features = tiers[i].features;
    *supported = assay_cpu_supports(i);
    *allowed = *supported && tiers[i].compiled && i <= isa_cap();
    return ASSAY_OK;
}

int assay_variant_count(void) { return VARIANTS; }

int assay_variant_info(int i, const char **op, const char **isa, int *compiled, int *supported, int *selected) {
    if (i < 0 || i >= VARIANTS) return ASSAY_EINVAL;
    *op = variants[i].op_name;
    *isa = variants[i].isa_name;
    *compiled = variants[i].kernel != NULL;
    *supported = assay_cpu_supports(variants[i].isa);
    *selected = *compiled && assay_select(variants[i].op, -1) == variants[i].kernel;
    return ASSAY_OK;
}
