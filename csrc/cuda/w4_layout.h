/* INT4 weights on a GPU: where everything is. Read by the kernels (C++) and by the packing (C).
 *
 * Columns go in tiles of 32, K in steps of 32 (K padded to a multiple of 128, padding is 0). Three sections follow each other:
 *   weights  [tiles][steps] of 512 bytes: lane l's 16 bytes are its B fragments of the step, word j for columns 8j .. 8j + 7.
 *            With n = l / 4, t = l % 4, bits 4i + 16e .. +3 of word j hold q of column 8j + n and
 *            k = 16 (i / 2) + 8 (i % 2) + 2t + e: the order of mma.m16n8k16's B registers, low and high halves 16 bits apart,
 *            so that two steps of it come out of one word by masks and a shift.
 *   scales   [tiles][G] of 64 bytes: float16, at 8 t + 2 j + e that of column 8j + 2t + e: a lane's share of the accumulators'
 *            columns is one 16-byte load.
 *   zeros    [tiles][G] of 32 bytes (when not symmetric): at 4 n + j that of column 8j + n: a lane's share of the B columns
 *            is one word.
 * Columns past N have scale 0 and zero point 0. */
#ifndef ASSAY_W4_LAYOUT_H
#define ASSAY_W4_LAYOUT_H

enum {
    ASSAY_CUDA_W4_TILE = 32,         /* columns */
    ASSAY_CUDA_W4_STEP = 32,         /* of K */
    ASSAY_CUDA_W4_STEP_BYTES = 512,
    ASSAY_CUDA_W4_SCALES_BYTES = 64,
    ASSAY_CUDA_W4_ZEROS_BYTES = 32,
    ASSAY_CUDA_W4_PAD = 128          /* K is padded to a multiple of it */
};

#endif
