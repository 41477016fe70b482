/* Statistics of a tensor, gathered block by block while a block is in the first-level cache. */

#ifndef MPTRAIN_OBSERVE_H
#define MPTRAIN_OBSERVE_H

#include "common.h"

/* A magnitude code (the input without its sign bit) decides alone what happens to the element: up to `flush` it becomes
 * zero, from `overflow` it saturates, from `infinite` it is Inf, above that NaN; from `lost` it does not come back finite
 * when it is scaled back. */
typedef struct { u32 flush, overflow, infinite, lost; } limits;

/* What a call asks for: each pointer may be NULL. All are added to, but for amax, which is overwritten. */
typedef struct {
    const void *x;
    i64 row;          /* elements of a row, at whose end a block ends; the whole tensor where the two agree */
    int in, f;
    float scale, inverse;
    limits l;
    i64 *counts;      /* [5]: elements, saturated, flushed, inf, nan */
    i64 *histogram;   /* [N_BINS] */
    double *errors;   /* [2]: sums of x^2 and of (x - dequantized)^2 */
    i64 *blocks;      /* [2][256]: exponents of the maxima of 32 and of 128 elements */
    float *amax;
} request;

/* Index of a magnitude with FP32 bits b in a raw table: ceil(b / 2^20). That is 0 for zero, bin + 1 for the others (bins
 * are closed above), one and the same, LAST, for the largest finite values and Inf, and from there to 2048 for NaN. */
#define LAST 2040
#define RAW 2056
#define N_BINS 2043
#if defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__) && defined(__GFNI__) && \
    defined(__AVX512VPOPCNTDQ__)
#define SLICED 1
#define TABLES 1
#else
#define SLICED 0
#define TABLES 4   /* neighbours count in different tables: one table alone waits for its own last store, 5 cycles */
#endif

typedef struct {
    i64 raw[TABLES][RAW];
    i64 infinite;
    u32 top;           /* raw index at the top of the window of counting by bits; 0: the block's own maximum */
    int patience;      /* blocks to wait before looking for a better window */
    int plain;         /* blocks to count without one */
} bins;

/* A thread's own share. */
typedef struct {
    u32 magnitude;
    i64 saturated, flushed, nonfinite, nan;
    double errors[2];
    i64 blocks[4][2][256];   /* four tables, for the same reason */
    bins bins;
} partial;

SHARED limits limits_of(int in, int f, float scale);
SHARED u32 largest(int in, const void *x, i64 start, i64 stop);
SHARED u32 largest_below(int in, const void *x, i64 start, i64 stop, u32 limit);
SHARED float magnitude_of(int in, u32 code);
SHARED void observe_begin(partial *p, const request *r);
SHARED void observe_span(partial *p, const request *r, i64 start, i64 stop);
SHARED void observe_merge(const partial *p, const request *r, u32 *magnitude);

SHARED void count_bins(bins *b, int in, const void *x, i64 start, i64 stop, u32 magnitude);
SHARED void count_blocks(i64 (*tables)[2][256], int in, const void *x, i64 start, i64 stop, i64 row);

#endif
