/* Row blocks in kinds: one function a kind of weights and a row count, and lists of them. */
#ifndef ASSAY_GEMM_BLOCKS_H
#define ASSAY_GEMM_BLOCKS_H

#include "gemm_tiles.h"

#define KIND(body, kind, r) BLOCK(body##_##kind##_##r, body, r, kind)
#define KINDS4(body, kind) KIND(body, kind, 1) KIND(body, kind, 2) KIND(body, kind, 3) KIND(body, kind, 4)
#define KINDS6(body, kind) KINDS4(body, kind) KIND(body, kind, 5) KIND(body, kind, 6)
#define KINDS8(body, kind) KINDS6(body, kind) KIND(body, kind, 7) KIND(body, kind, 8)
#define LIST4(body, kind) body##_##kind##_1, body##_##kind##_2, body##_##kind##_3, body##_##kind##_4
#define LIST6(body, kind) LIST4(body, kind), body##_##kind##_5, body##_##kind##_6
#define LIST8(body, kind) LIST6(body, kind), body##_##kind##_7, body##_##kind##_8

#endif
