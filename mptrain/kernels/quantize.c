/* One pass over memory per tensor: maximum, quantization, emulated rounding and counting. Plain C, no headers of torch.
 *
 * Rounding. For a magnitude m in [2^e, 2^(e+1)) and a format of b mantissa bits, FP32 addition of C = 2^(e+23-b) has a
 * last place of 2^(e-b), so (m + C) - C is m rounded to nearest-even in the format. With e held at the format's lowest
 * normal exponent the same addition rounds subnormals. The integer bits(m + C) - bits(C) is the significand, and the
 * code is ((e - lowest e) << b) + significand. No branch, no table: a compiler turns the loop into vector code.
 * Compile with -ffp-contract=off and never with -ffast-math: NaN and Inf are data here.
 *
 * Every NaN leaves as the one canonical positive NaN, so that implementations can be compared bit for bit. */

#include <stdint.h>
#include <string.h>

typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;
typedef int64_t i64;

#define ALWAYS static inline __attribute__((always_inline))
#define INFINITE 0x7f800000u
#define NAN_BITS 0x7fc00000u
/* Elements of one task: at most 16 KiB of input, so what the census read is in the first-level cache for the rounding. */
#define BLOCK 4096

enum input { F32, BF16, F16 };
enum format { E4M3, E5M2, HALF, TF32 };
/* What is written: codes; codes and their values in BF16 or FP32; the values scaled back, in the input's type; or the
 * values alone, in BF16. */
enum output { CODES, CODES_BF16, CODES_F32, SCALED_BACK, VALUES_BF16, OUTPUTS };

typedef struct {
    int mantissa;   /* explicit mantissa bits */
    u32 lowest;     /* bits of the smallest normal magnitude */
    u32 clamp;      /* magnitudes are cut to this first: the maximum, or for FP16 2^16, whose code is Inf */
    u32 overflow;   /* bits of the smallest FP32 magnitude that overflows (formats.overflows) */
    u32 nan;        /* code of the canonical NaN */
    int sign;       /* right shift that puts FP32's sign bit in place */
} spec;

static const spec SPECS[] = {
    [E4M3] = {3, 0x3c800000u, 0x43e00000u, 0x43e80001u, 0x7f, 24},
    [E5M2] = {2, 0x38800000u, 0x47600000u, 0x47700000u, 0x7f, 24},
    [HALF] = {10, 0x38800000u, 0x47800000u, 0x477ff000u, 0x7e00, 16},
    [TF32] = {10, 0x00800000u, INFINITE, 0x7f7ff000u, NAN_BITS, 0},
};

/* Counts of one block. A magnitude code (the input without its sign bit) decides alone what happens to the element:
 * up to `flush` it becomes zero, from `overflow` it saturates, from `infinite` it is Inf, above that NaN. */
typedef struct { u32 magnitude, flushed, saturated, nonfinite, nan; } tally;
typedef struct { u32 flush, overflow, infinite; } limits;

ALWAYS float real(u32 bits) { float f; memcpy(&f, &bits, 4); return f; }
ALWAYS u32 bits_of(float f) { u32 u; memcpy(&u, &f, 4); return u; }

/* FP32 bits of an 8- or 16-bit value with 5 or 4 exponent bits (h: magnitude code). Subnormals come out of an exact
 * subtraction of normal numbers, so the result does not depend on the flush-to-zero mode. */
ALWAYS u32 widen(u32 h, const spec s) {
    u32 unit = 1u << (23 - s.mantissa), bias = s.lowest - 0x00800000u;
    u32 normal = h * unit + bias;
    u32 subnormal = bits_of(real(normal + 0x00800000u) - real(s.lowest));
    return h >> s.mantissa ? normal : subnormal;
}

ALWAYS u32 half_to_float(u32 h) {
    u32 m = h & 0x7fffu, wide = widen(m, SPECS[HALF]);
    wide = m >= 0x7c00u ? (m << 13) + 0x70000000u : wide;
    return wide | (h & 0x8000u) << 16;
}

ALWAYS u16 bf16_of(u32 u) {
    u32 rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    return (u16)((u & 0x7fffffffu) > INFINITE ? NAN_BITS >> 16 : rounded);
}

/* Round magnitude m (FP32 bits, at most s.clamp or NaN): the code without sign, and the rounded value's bits. */
ALWAYS u32 round_to(u32 m, const spec s, u32 *value) {
    u32 cut = m < s.clamp ? m : s.clamp;
    u32 exponent = (cut > s.lowest ? cut : s.lowest) & INFINITE;
    u32 magic = exponent + ((u32)(23 - s.mantissa) << 23);
    float sum = real(cut) + real(magic);
    u32 nan = m > INFINITE, rounded = bits_of(sum - real(magic));
    if (s.sign == 16) rounded = rounded == s.clamp ? INFINITE : rounded;
    *value = nan ? NAN_BITS : rounded;
    u32 code = ((exponent - s.lowest) >> (23 - s.mantissa)) + (bits_of(sum) - magic);
    return nan ? s.nan : code;
}

ALWAYS u32 round_tf32(u32 m) {
    u32 rounded = (m + 0xfffu + (m >> 13 & 1u)) & ~0x1fffu;
    return m > INFINITE ? NAN_BITS : m == INFINITE ? m : rounded;
}

ALWAYS u32 load(int in, const void *x, i64 i) {
    if (in == F32) return ((const u32 *)x)[i];
    if (in == BF16) return (u32)((const u16 *)x)[i] << 16;
    return half_to_float(((const u16 *)x)[i]);
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
        if (f == TF32) value = round_tf32(m);
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

#define KEY(in, f, out) ((in) * 4 + (f)) * OUTPUTS + (out)
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

/* Smallest magnitude code in [1, infinite] whose product with |scale| has at least `floor` as FP32 bits and is not NaN
 * (infinite if there is none). Products grow with the code, so bisection finds it. */
static u32 first_at_least(int in, u32 infinite, float scale, u32 floor) {
    u32 low = 1, high = infinite;
    while (low < high) {
        u32 middle = low + (high - low) / 2, code = middle;
        u16 narrow = (u16)middle;
        u32 wide = in == F32 ? load(F32, &code, 0) : in == BF16 ? load(BF16, &narrow, 0) : load(F16, &narrow, 0);
        u32 m = bits_of(real(wide) * scale) & 0x7fffffffu;
        if (m >= floor && m <= INFINITE) high = middle;
        else low = middle + 1;
    }
    return low;
}

/* Results of m are zero up to half the smallest subnormal (the tie goes to even): lowest * 2^-(mantissa + 1). */
static limits limits_of(int in, int f, float scale) {
    u32 infinite = in == F32 ? INFINITE : in == BF16 ? 0x7f80u : 0x7c00u;
    u32 tie = f == TF32 ? 0x1000u : SPECS[f].lowest - ((u32)(SPECS[f].mantissa + 1) << 23);
    if ((bits_of(scale) & 0x7fffffffu) > INFINITE) return (limits){0, infinite, infinite};
    return (limits){first_at_least(in, infinite, scale, tie + 1) - 1,
                    first_at_least(in, infinite, scale, SPECS[f].overflow), infinite};
}

/* Maximum and flushed elements in one cheap loop, in the input's own width (BLOCK fits 16-bit counters); the others
 * only where the maximum says that there are any. */
#define CENSUS(name, type, mask) \
    static tally name(const void *restrict x, i64 start, i64 stop, const limits l) { \
        const type *p = x; \
        type magnitude = 0, flushed = 0, saturated = 0, nonfinite = 0, nan = 0; \
        const type flush = (type)l.flush, overflow = (type)l.overflow, infinite = (type)l.infinite; \
        _Pragma("omp simd reduction(max : magnitude) reduction(+ : flushed)") \
        for (i64 i = start; i < stop; i++) { \
            type m = p[i] & mask; \
            magnitude = m > magnitude ? m : magnitude; \
            flushed += (type)(m - 1) < flush; \
        } \
        if (magnitude < overflow) return (tally){magnitude, flushed, 0, 0, 0}; \
        _Pragma("omp simd reduction(+ : saturated, nonfinite, nan)") \
        for (i64 i = start; i < stop; i++) { \
            type m = p[i] & mask; \
            saturated += m >= overflow, nonfinite += m >= infinite, nan += m > infinite; \
        } \
        return (tally){magnitude, flushed, (u32)(saturated - nonfinite), nonfinite, nan}; \
    }
CENSUS(census_wide, u32, 0x7fffffffu)
CENSUS(census_narrow, u16, 0x7fffu)

/* Only the largest magnitude code. */
#define LARGEST(name, type, mask) \
    static u32 name(const void *restrict x, i64 start, i64 stop) { \
        const type *p = x; \
        type magnitude = 0; \
        _Pragma("omp simd reduction(max : magnitude)") \
        for (i64 i = start; i < stop; i++) magnitude = (p[i] & mask) > magnitude ? (p[i] & mask) : magnitude; \
        return magnitude; \
    }
LARGEST(largest_wide, u32, 0x7fffffffu)
LARGEST(largest_narrow, u16, 0x7fffu)

/* A magnitude code as FP32, NaN canonical. */
static float magnitude_of(int in, u32 code) {
    u32 wide = in == F32 ? code : in == BF16 ? code << 16 : half_to_float(code);
    return real(wide > INFINITE ? NAN_BITS : wide);
}

/* max |x| of n elements into *out; NaN if any is NaN, else Inf if any is Inf (as integers, NaN > Inf > finite). */
void mp_amax(const void *x, i64 n, int in, int threads, float *out) {
    u32 result = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(max : result) if (threads > 1)
    for (i64 start = 0; start < n; start += BLOCK) {
        i64 stop = start + BLOCK < n ? start + BLOCK : n;
        u32 here = in == F32 ? largest_wide(x, start, stop) : largest_narrow(x, start, stop);
        result = here > result ? here : result;
    }
    *out = magnitude_of(in, result);
}

/* Transposing 16-bit values by tiles. Interleaving row i of a tile with row i + TILE / 2 is a perfect shuffle of the
 * tile; log2(TILE) of them transpose it, all in whole vectors. */
#define TILE 32

ALWAYS void shuffle(u16 (*restrict to)[TILE], u16 (*restrict from)[TILE]) {
    for (int row = 0; row < TILE / 2; row++) {
        u16 *restrict pair = to[2 * row];
#pragma omp simd
        for (int i = 0; i < TILE; i++) pair[2 * i] = from[row][i], pair[2 * i + 1] = from[row + TILE / 2][i];
    }
}

static void transpose_tile(const u16 *x, i64 rows, i64 cols, u16 *out) {
    u16 a[TILE][TILE], b[TILE][TILE];
    for (int col = 0; col < TILE; col++) __builtin_prefetch(out + col * rows + 2 * TILE, 1);
    for (int row = 0; row < TILE; row++) memcpy(a[row], x + row * cols, sizeof a[row]);
    shuffle(b, a), shuffle(a, b), shuffle(b, a), shuffle(a, b), shuffle(b, a);
    for (int col = 0; col < TILE; col++) memcpy(out + col * rows, b[col], sizeof b[col]);
}

/* A part of a matrix [rows, cols], and its transpose from `x` into `out`, which is [cols, rows]. */
typedef struct { i64 top, bottom, left, right; } part;

static void transpose_part(const u16 *x, i64 rows, i64 cols, const part p, u16 *out) {
    for (i64 col = p.left; col < p.right; col += TILE)
        for (i64 row = p.top; row < p.bottom; row += TILE) {
            if (row + TILE <= p.bottom && col + TILE <= p.right) {
                transpose_tile(x + row * cols + col, rows, cols, out + col * rows + row);
                continue;
            }
            for (i64 r = row; r < p.bottom && r < row + TILE; r++)
                for (i64 c = col; c < p.right && c < col + TILE; c++) out[c * rows + r] = x[r * cols + c];
        }
}

/* Quantize a matrix [rows, cols] times *scale. counts: int64[5] added to, or NULL; amax: overwritten, or NULL;
 * transposed: the BF16 values once more, as [cols, rows], or NULL. For it the matrix is cut into patches that stay in
 * the second-level cache between writing and transposing; without it any tensor is one long row. */
#define PATCH 256

void mp_quantize(const void *x, i64 rows, i64 cols, int in, int f, int out, const float *scale, void *codes,
                 void *values, void *transposed, i64 *counts, float *amax, int threads) {
    const int key = KEY(in, f, out), stats = counts || amax;
    const float factor = *scale, inverse = 1.0f / factor;
    const limits l = counts ? limits_of(in, f, factor) : (limits){0, ~0u, ~0u};
    const i64 height = transposed ? PATCH : 1, width = transposed ? PATCH : BLOCK;
    u32 magnitude = 0;
    i64 saturated = 0, flushed = 0, nonfinite = 0, nan = 0;
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads) if (threads > 1) \
    reduction(max : magnitude) reduction(+ : saturated, flushed, nonfinite, nan)
    for (i64 top = 0; top < rows; top += height)
        for (i64 left = 0; left < cols; left += width) {
            const part p = {top, top + height < rows ? top + height : rows, left,
                            left + width < cols ? left + width : cols};
            for (i64 row = p.top; row < p.bottom; row++) {
                i64 start = row * cols + p.left, stop = row * cols + p.right;
                if (stats) {
                    tally t = in == F32 ? census_wide(x, start, stop, l) : census_narrow(x, start, stop, l);
                    magnitude = t.magnitude > magnitude ? t.magnitude : magnitude;
                    saturated += t.saturated, flushed += t.flushed, nonfinite += t.nonfinite, nan += t.nan;
                }
                block(key, x, codes, values, start, stop, factor, inverse);
            }
            if (transposed) transpose_part(values, rows, cols, p, transposed);
        }
    if (amax) *amax = magnitude_of(in, magnitude);
    if (!counts) return;
    counts[0] += rows * cols, counts[1] += saturated, counts[2] += flushed;
    counts[3] += nonfinite - nan, counts[4] += nan;
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

/* Column sums of x [rows, cols] in FP32, in the order of torch.sum (its cascade of four levels, so that the bits are
 * the same): rows add up in groups of 2^power, the groups in groups, and so on. Without torch's FP32 copy of x, which
 * took two thirds of its 5.3 ms for 2048 x 1536 in BF16. Independent of the number of threads. */
#define LEVELS 4
#define STRIPE 128
#define GROUP 16

ALWAYS void stripe(int in, const void *x, i64 rows, i64 cols, i64 first, int width, int power, float *out) {
    float sums[LEVELS][STRIPE] = {{0}};
    i64 row = 0;
    while (row + GROUP <= rows) {
#pragma omp simd
        for (int c = 0; c < width; c++) {
            float sum = sums[0][c];
#pragma GCC unroll 16
            for (int r = 0; r < GROUP; r++) sum += real(load(in, x, (row + r) * cols + first + c));
            sums[0][c] = sum;
        }
        row += GROUP;
        if (row & ((1 << power) - 1)) continue;
        for (int level = 1; level < LEVELS; level++) {
            for (int c = 0; c < width; c++) sums[level][c] += sums[level - 1][c], sums[level - 1][c] = 0;
            if (row >> level * power & ((1 << power) - 1)) break;
        }
    }
    for (; row < rows; row++)
        for (int c = 0; c < width; c++) sums[0][c] += real(load(in, x, row * cols + first + c));
    for (int level = 1; level < LEVELS; level++)
        for (int c = 0; c < width; c++) sums[0][c] += sums[level][c];
    memcpy(out + first, sums[0], sizeof(float) * width);
}

void mp_column_sums(const void *x, i64 rows, i64 cols, int in, float *out, int threads) {
    int log2 = 0;
    while (((i64)1 << log2) < rows) log2++;
    const int power = log2 / LEVELS > 4 ? log2 / LEVELS : 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (i64 first = 0; first < cols; first += STRIPE) {
        int width = (int)(cols - first < STRIPE ? cols - first : STRIPE);
        switch (in) {
            case F32: stripe(F32, x, rows, cols, first, width, power, out); break;
            case BF16: stripe(BF16, x, rows, cols, first, width, power, out); break;
            default: stripe(F16, x, rows, cols, first, width, power, out);
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
