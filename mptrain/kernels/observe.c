/* Maximum, counts and errors of a block; the request as a whole. */

#include "observe.h"

/* FP32 bits of y (FP32 bits too) rounded in f and multiplied by `inverse`. */
ALWAYS u32 scaled_back(int f, u32 y, float inverse) {
    u32 m = y & 0x7fffffffu, value;
    if (f >= TF32) value = round_wide(m, SPECS[f].mantissa);
    else round_to(m, SPECS[f], &value);
    return bits_of(real(value | (y & 0x80000000u)) * inverse);
}

/* Smallest magnitude code in [1, infinite] whose product with |scale| has at least `floor` as FP32 bits and is not NaN
 * (infinite if there is none). Products grow with the code, so bisection finds it. */
static u32 first_at_least(int in, u32 infinite, float scale, u32 floor) {
    u32 low = 1, high = infinite;
    while (low < high) {
        u32 middle = low + (high - low) / 2, m = bits_of(real(magnitude_bits(in, middle)) * scale) & 0x7fffffffu;
        if (m >= floor && m <= INFINITE) high = middle;
        else low = middle + 1;
    }
    return low;
}

/* Smallest magnitude code in [1, infinite] that does not come back finite. */
static u32 first_lost(int in, int f, float scale, float inverse) {
    u32 low = 1, high = infinite_code(in);
    while (low < high) {
        u32 middle = low + (high - low) / 2, y = bits_of(real(magnitude_bits(in, middle)) * scale);
        if ((scaled_back(f, y, inverse) & 0x7fffffffu) >= INFINITE) high = middle;
        else low = middle + 1;
    }
    return low;
}

/* Results of m are zero up to half the smallest subnormal (the tie goes to even): lowest * 2^-(mantissa + 1). */
limits limits_of(int in, int f, float scale) {
    u32 infinite = infinite_code(in), lost = first_lost(in, f, scale, 1.0f / scale);
    u32 tie = f >= TF32 ? 1u << (22 - SPECS[f].mantissa) : SPECS[f].lowest - ((u32)(SPECS[f].mantissa + 1) << 23);
    if ((bits_of(scale) & 0x7fffffffu) > INFINITE) return (limits){0, infinite, infinite, lost};
    return (limits){first_at_least(in, infinite, scale, tie + 1) - 1,
                    first_at_least(in, infinite, scale, SPECS[f].overflow), infinite, lost};
}

/* Counts of one block. */
typedef struct { u32 magnitude, flushed, saturated, nonfinite, nan; } tally;

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

/* Largest magnitude code, and the largest one below a limit. */
#define LARGEST(name, type, mask) \
    static u32 name(const void *restrict x, i64 start, i64 stop) { \
        const type *p = x; \
        type magnitude = 0; \
        _Pragma("omp simd reduction(max : magnitude)") \
        for (i64 i = start; i < stop; i++) magnitude = (p[i] & mask) > magnitude ? (p[i] & mask) : magnitude; \
        return magnitude; \
    } \
    static u32 name##_below(const void *restrict x, i64 start, i64 stop, type limit) { \
        const type *p = x; \
        type magnitude = 0; \
        _Pragma("omp simd reduction(max : magnitude)") \
        for (i64 i = start; i < stop; i++) { \
            type m = p[i] & mask, here = m < limit ? m : 0; \
            magnitude = here > magnitude ? here : magnitude; \
        } \
        return magnitude; \
    }
LARGEST(wide, u32, 0x7fffffffu)
LARGEST(narrow, u16, 0x7fffu)

u32 largest(int in, const void *x, i64 start, i64 stop) {
    return in == F32 ? wide(x, start, stop) : narrow(x, start, stop);
}

u32 largest_below(int in, const void *x, i64 start, i64 stop, u32 limit) {
    return in == F32 ? wide_below(x, start, stop, limit) : narrow_below(x, start, stop, (u16)limit);
}

/* A magnitude code as FP32, NaN canonical. */
float magnitude_of(int in, u32 code) {
    u32 wide = magnitude_bits(in, code);
    return real(wide > INFINITE ? NAN_BITS : wide);
}

/* Sums of squares in FP32, over few enough elements that rounding stays below 1e-5 for constant data too. Elements are
 * multiplied by `unit` first, a power of two that brings the block's maximum near 1: squares reach 2^256 and 2^-298. */
#define SUMMED 512
#ifdef __FMA__
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

typedef struct { float scale, inverse, unit; } factors;

ALWAYS void squares(int in, int f, const void *x, i64 start, i64 stop, const factors by, double *out) {
    float energy = 0, error = 0;
#pragma omp simd reduction(+ : energy, error)
    for (i64 i = start; i < stop; i++) {
        u32 raw = load(in, x, i);
        float back = real(scaled_back(f, bits_of(real(raw) * by.scale), by.inverse));
        u32 finite = (raw & 0x7fffffffu) < INFINITE && (bits_of(back) & 0x7fffffffu) < INFINITE;
        float size = finite ? real(raw) * by.unit : 0, off = finite ? (real(raw) - back) * by.unit : 0;
        energy += size * size, error += off * off;
    }
    out[0] += energy, out[1] += error;
}

/* The same where nothing is lost, so that no element has to be looked at for that: half the instructions. Takes absolute
 * factors, `inverse` times `unit` already. */
ALWAYS void squares_kept(int in, int f, const void *x, i64 start, i64 stop, const factors by, double *out) {
    const spec s = SPECS[f];
    float energy = 0, error = 0;
#pragma omp simd reduction(+ : energy, error)
    for (i64 i = start; i < stop; i++) {
        float magnitude = real(load(in, x, i) & 0x7fffffffu), rounded;
        u32 m = bits_of(magnitude * by.scale), unit = 1u << (23 - s.mantissa);
        if (f >= TF32) {
            rounded = real((m + unit / 2 - 1 + (m / unit & 1u)) & -unit);
        } else {
            u32 cut = m < s.clamp ? m : s.clamp, exponent = (cut > s.lowest ? cut : s.lowest) & INFINITE;
            float magic = real(exponent + ((u32)(23 - s.mantissa) << 23));
            rounded = real(cut) + magic - magic;
        }
        float size = magnitude * by.unit, off = size - rounded * by.inverse;
        energy = MULTIPLY_ADD(size, size, energy), error = MULTIPLY_ADD(off, off, error);
    }
    out[0] += energy, out[1] += error;
}

#define SQUARES(in, f, kept) case ((in) * FORMATS + (f)) * 2 + (kept): \
    (kept ? squares_kept : squares)(in, f, r->x, first, last, by, sums); break;
#define EACH_FORMAT(in, kept) SQUARES(in, E4M3, kept) SQUARES(in, E5M2, kept) SQUARES(in, HALF, kept) \
    SQUARES(in, TF32, kept) SQUARES(in, BFLOAT, kept)
#define EACH_INPUT(kept) EACH_FORMAT(F32, kept) EACH_FORMAT(BF16, kept) EACH_FORMAT(F16, kept)

ALWAYS float absolute(float value) { return real(bits_of(value) & 0x7fffffffu); }

static void add_errors(double *errors, const request *r, i64 start, i64 stop, u32 magnitude) {
    factors by = {r->scale, r->inverse, 1};
    int kept = magnitude < r->l.lost && bits_of(absolute(r->scale)) < INFINITE;
    if (magnitude >= r->l.lost) magnitude = largest_below(r->in, r->x, start, stop, r->l.lost);
    u32 exponent = magnitude_bits(r->in, magnitude) >> 23;
    exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    by.unit = real((254 - exponent) << 23);
    const float inverse = absolute(r->inverse) * by.unit;
    kept = kept && inverse > 0x1p-126f && bits_of(inverse) < INFINITE && absolute(r->inverse) > 0x1p-126f;
    if (kept) by.scale = absolute(r->scale), by.inverse = inverse;
    double sums[2] = {0, 0};
    for (i64 first = start; first < stop; first += SUMMED) {
        i64 last = first + SUMMED < stop ? first + SUMMED : stop;
        switch ((r->in * FORMATS + r->f) * 2 + kept) { EACH_INPUT(0) EACH_INPUT(1) }
    }
    errors[0] += sums[0] / by.unit / by.unit, errors[1] += sums[1] / by.unit / by.unit;
}

void observe_begin(partial *p, const request *r) {
    p->magnitude = 0;
    p->saturated = p->flushed = p->nonfinite = p->nan = 0;
    p->errors[0] = p->errors[1] = 0;
    if (r->histogram) memset(&p->bins, 0, sizeof p->bins);
    if (r->blocks) memset(p->blocks, 0, sizeof p->blocks);
}

/* At most BLOCK elements, starting at a block of 128. */
void observe_span(partial *p, const request *r, i64 start, i64 stop) {
    u32 magnitude;
    if (r->counts) {
        tally t = r->in == F32 ? census_wide(r->x, start, stop, r->l) : census_narrow(r->x, start, stop, r->l);
        p->saturated += t.saturated, p->flushed += t.flushed, p->nonfinite += t.nonfinite, p->nan += t.nan;
        magnitude = t.magnitude;
    } else {
        magnitude = largest(r->in, r->x, start, stop);
    }
    p->magnitude = magnitude > p->magnitude ? magnitude : p->magnitude;
    if (r->histogram) count_bins(&p->bins, r->in, r->x, start, stop, magnitude);
    if (r->blocks) count_blocks(p->blocks, r->in, r->x, start, stop, r->row);
    if (r->errors) add_errors(p->errors, r, start, stop, magnitude);
}

static void merge_bins(const bins *b, i64 *out) {
    i64 nan = 0;
    for (int table = 0; table < TABLES; table++) {
        const i64 *raw = b->raw[table];
        for (int i = 0; i < LAST; i++) out[i] += raw[i + 1];
        for (int i = LAST + 1; i < RAW; i++) nan += raw[i];
        out[LAST] += raw[0];
    }
    out[LAST - 1] -= b->infinite, out[LAST + 1] += b->infinite, out[LAST + 2] += nan;
}

/* Add a thread's integers: the order does not matter. Its errors are added by the caller, in the order of threads. */
void observe_merge(const partial *p, const request *r, u32 *magnitude) {
    *magnitude = p->magnitude > *magnitude ? p->magnitude : *magnitude;
    if (r->counts) {
        r->counts[1] += p->saturated, r->counts[2] += p->flushed;
        r->counts[3] += p->nonfinite - p->nan, r->counts[4] += p->nan;
    }
    if (r->histogram) merge_bins(&p->bins, r->histogram);
    if (!r->blocks) return;
    for (int table = 0; table < 4; table++)
        for (int i = 0; i < 512; i++) r->blocks[i] += p->blocks[table][i / 256][i % 256];
}
