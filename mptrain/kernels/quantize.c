/* One pass over memory per tensor: maximum, quantization, emulated rounding and counting. Plain C, no headers of torch.
 *
 * Rounding. For a magnitude m in [2^e, 2^(e+1)) and a format of b mantissa bits, FP32 addition of C = 2^(e+23-b) has a
 * last place of 2^(e-b), so (m + C) - C is m rounded to nearest-even in the format. With e held at the format's lowest
 * normal exponent the same addition rounds subnormals. The integer bits(m + C) - bits(C) is the significand, and the
 * code is ((e - lowest e) << b) + significand. No branch, no table: a compiler turns the loop into vector code.
 * Compile with -ffp-contract=off and never with -ffast-math: NaN and Inf are data here.
 *
 * Every NaN leaves as the one canonical positive NaN, so that implementations can be compared bit for bit. */

#include <stddef.h>

#include "matrix.h"
#include "observe.h"

/* What is written: codes; codes and their values in BF16 or FP32; the values scaled back, in the input's type; the
 * values alone, in BF16; or nothing, to observe. */
enum output { CODES, CODES_BF16, CODES_F32, SCALED_BACK, VALUES_BF16, NOTHING, OUTPUTS };

ALWAYS u16 bf16_of(u32 u) {
    u32 rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    return (u16)((u & 0x7fffffffu) > INFINITE ? NAN_BITS >> 16 : rounded);
}

ALWAYS void store_value(int type, void *out, i64 i, u32 value) {
    u32 code, ignored, m = value & 0x7fffffffu;
    if (type == F32) { ((u32 *)out)[i] = value; return; }
    if (type == BF16) { ((u16 *)out)[i] = bf16_of(value); return; }
    code = round_to(m, SPECS[HALF], &ignored);
    ((u16 *)out)[i] = (u16)(m > INFINITE ? code : code | (value >> 16 & 0x8000u));
}

/* The kernel; `in`, `f` and `out` are constants at every call, so each call site is one specialised loop. `values` may
 * be `x` itself (rounding in place): `omp simd` promises no dependence between iterations, `restrict` would be false. */
ALWAYS void span(int in, int f, int out, const void *x, void *codes, void *values, i64 start, i64 stop, float scale,
                 float inverse) {
#pragma omp simd
    for (i64 i = start; i < stop; i++) {
        u32 value, code = 0, y = bits_of(real(load(in, x, i)) * scale), m = y & 0x7fffffffu;
        if (f == TF32) value = round_wide(m, SPECS[TF32].mantissa);
        else code = round_to(m, SPECS[f], &value);
        u32 sign = m > INFINITE ? 0 : y & 0x80000000u;
        if (out == SCALED_BACK) {
            u32 back = bits_of(real(value | sign) * inverse);
            store_value(in, values, i, (back & 0x7fffffffu) > INFINITE ? NAN_BITS : back);
            continue;
        }
        if (f == HALF) ((u16 *)codes)[i] = (u16)(code | sign >> 16);
        else if (out != VALUES_BF16) ((u8 *)codes)[i] = (u8)(code | sign >> 24);
        if (out == CODES_BF16 || out == VALUES_BF16) ((u16 *)values)[i] = (u16)((value | sign) >> 16);
        if (out == CODES_F32) ((u32 *)values)[i] = value | sign;
    }
}

#define KEY(in, f, out) ((in) * FORMATS + (f)) * OUTPUTS + (out)
#define CASE(in, f, out) \
    case KEY(in, f, out): span(in, f, out, x, codes, values, start, stop, scale, inverse); break;
#define FP8(in, f) CASE(in, f, CODES) CASE(in, f, CODES_BF16) CASE(in, f, CODES_F32) CASE(in, f, SCALED_BACK) \
    CASE(in, f, VALUES_BF16)
#define INPUT(in) \
    FP8(in, E4M3) FP8(in, E5M2) \
    CASE(in, HALF, CODES) CASE(in, HALF, CODES_F32) CASE(in, HALF, SCALED_BACK) CASE(in, TF32, SCALED_BACK)

static void block(int key, const void *x, void *codes, void *values, i64 start, i64 stop, float scale, float inverse) {
    switch (key) { INPUT(F32) INPUT(BF16) INPUT(F16) }
}

/* max |x| of n elements into *out; NaN if any is NaN, else Inf if any is Inf (as integers, NaN > Inf > finite). */
void mp_amax(const void *x, i64 n, int in, int threads, float *out) {
    u32 result = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(max : result) if (threads > 1)
    for (i64 start = 0; start < n; start += BLOCK) {
        u32 here = largest(in, x, start, start + BLOCK < n ? start + BLOCK : n);
        result = here > result ? here : result;
    }
    *out = magnitude_of(in, result);
}

/* How a tensor is cut into tasks. Without a transpose any tensor is one long row, unless blocks of 128 end with shorter
 * rows: a task then begins with a row, or a multiple of BLOCK into it. With a transpose the matrix is cut into patches
 * that stay in the second-level cache between writing and transposing. */
#define PATCH 256

typedef struct { i64 rows, cols, height, width, row; } tiling;

static tiling tile(i64 rows, i64 cols, int transposed, int blocks) {
    const i64 n = rows * cols, row = cols % 128 ? cols : n;
    if (transposed) return (tiling){rows, cols, PATCH, PATCH, row};
    if (!blocks || row == n) return (tiling){1, n, 1, BLOCK, n};
    if (cols <= BLOCK) return (tiling){1, n, 1, BLOCK / cols * cols, cols};
    return (tiling){rows, cols, 1, BLOCK, cols};
}

typedef struct { int key; void *codes, *values; u16 *transposed; } target;

static void run_task(const request *r, const tiling *g, const target *to, i64 top, i64 left, partial *mine) {
    const part p = {top, top + g->height < g->rows ? top + g->height : g->rows, left,
                    left + g->width < g->cols ? left + g->width : g->cols};
    for (i64 row = p.top; row < p.bottom; row++) {
        i64 start = row * g->cols + p.left, stop = row * g->cols + p.right;
        if (mine) observe_span(mine, r, start, stop);
        block(to->key, r->x, to->codes, to->values, start, stop, r->scale, r->inverse);
    }
    if (to->transposed) transpose_part(to->values, g->rows, g->cols, p, to->transposed);
}

/* Every task of one of `threads` equal shares. */
static void run_share(const request *r, const tiling *g, const target *to, int share, int shares, double *errors,
                      u32 *magnitude) {
    const i64 across = (g->cols + g->width - 1) / g->width, tasks = (g->rows + g->height - 1) / g->height * across;
    const i64 first = tasks * share / shares, last = tasks * (share + 1) / shares;
    const int stats = r->counts || r->amax || r->histogram || r->errors || r->blocks;
    partial mine;
    if (stats) observe_begin(&mine, r);
    for (i64 task = first; task < last; task++)
        run_task(r, g, to, task / across * g->height, task % across * g->width, stats ? &mine : NULL);
    if (!stats) return;
    errors[0] = mine.errors[0], errors[1] = mine.errors[1];
#pragma omp critical
    observe_merge(&mine, r, magnitude);
}

/* Quantize x, [rows, cols] times *scale; see `output` for what is written where, and `request` for the statistics.
 * transposed: the BF16 values once more, as [cols, rows], or NULL. */
void mp_quantize(const void *x, i64 rows, i64 cols, int in, int f, int out, const float *scale, void *codes,
                 void *values, void *transposed, i64 *counts, float *amax, i64 *histogram, double *errors,
                 i64 *blocks, int threads) {
    const float factor = scale ? *scale : 1.0f;
    const limits l = counts || errors ? limits_of(in, f, factor) : (limits){0, ~0u, ~0u, ~0u};
    const tiling g = tile(rows, cols, transposed != NULL, blocks != NULL);
    const request r = {x, g.row, in, f, factor, 1.0f / factor, l, counts, histogram, errors, blocks, amax};
    const target to = {KEY(in, f, out), codes, values, transposed};
    double shares[threads][2];
    u32 magnitude = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int share = 0; share < threads; share++)
        run_share(&r, &g, &to, share, threads, shares[share], &magnitude);
    if (amax) *amax = magnitude_of(in, magnitude);
    if (counts) counts[0] += rows * cols;
    for (int share = 0; errors && share < threads; share++)
        errors[0] += shares[share][0], errors[1] += shares[share][1];
}

ALWAYS void decode(int f, int wide, const void *restrict codes, void *restrict out, i64 start, i64 stop) {
    const u32 sign = f == HALF ? 0x8000u : 0x80u, top = f == E4M3 ? 0x7f : f == E5M2 ? 0x7c : 0x7c00;
#pragma omp simd
    for (i64 i = start; i < stop; i++) {
        u32 c = f == HALF ? ((const u16 *)codes)[i] : ((const u8 *)codes)[i], h = c & (sign - 1);
        u32 value = widen(h, SPECS[f]) | (c & sign) << SPECS[f].sign;
        u32 special = f != E4M3 && h == top ? INFINITE | (c & sign) << SPECS[f].sign : NAN_BITS;
        value = h >= top ? special : value;
        if (wide) ((u32 *)out)[i] = value;
        else ((u16 *)out)[i] = bf16_of(value);
    }
}

/* Exact values of n codes, in FP32 (wide) or BF16 (FP16 codes round to nearest-even there). */
void mp_decode(const void *codes, i64 n, int f, int wide, void *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 start = 0; start < n; start += BLOCK) {
        i64 stop = start + BLOCK < n ? start + BLOCK : n;
        switch (f * 2 + wide) {
            case E4M3 * 2: decode(E4M3, 0, codes, out, start, stop); break;
            case E4M3 * 2 + 1: decode(E4M3, 1, codes, out, start, stop); break;
            case E5M2 * 2: decode(E5M2, 0, codes, out, start, stop); break;
            case E5M2 * 2 + 1: decode(E5M2, 1, codes, out, start, stop); break;
            case HALF * 2: decode(HALF, 0, codes, out, start, stop); break;
            default: decode(HALF, 1, codes, out, start, stop);
        }
    }
}

/* (maximum / amax) / divisor; 1 for amax 0, Inf or NaN; FLT_MAX where FP32 overflows (Transformer Engine's rule). */
void mp_scale(const float *amax, float maximum, float divisor, float *out) {
    u32 m = bits_of(*amax);
    float scale = maximum / *amax / divisor;
    if (m == 0 || m >= INFINITE) scale = 1.0f;
    *out = bits_of(scale) == INFINITE ? real(0x7f7fffffu) : scale;
}
