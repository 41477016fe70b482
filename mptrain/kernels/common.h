/* What the kernels share: number formats as FP32 bit patterns, loading, rounding. Each function is inlined. */

#ifndef MPTRAIN_COMMON_H
#define MPTRAIN_COMMON_H

#include <stdint.h>
#include <string.h>

typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;
typedef int64_t i64;

#define ALWAYS static inline __attribute__((always_inline))
#define SHARED __attribute__((visibility("hidden")))  /* between the files of the library only */
#define INFINITE 0x7f800000u
#define NAN_BITS 0x7fc00000u
/* Elements of one task: at most 16 KiB of input, so what the census read is in the first-level cache for the rounding. */
#define BLOCK 4096

enum input { F32, BF16, F16 };
enum format { E4M3, E5M2, HALF, TF32, BFLOAT, FORMATS };

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
    [BFLOAT] = {7, 0x00800000u, INFINITE, 0x7f7f8000u, NAN_BITS, 0},
};

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

/* TF32 and BF16 keep FP32's exponents: half a last place less one, plus the last kept bit, and cut. */
ALWAYS u32 round_wide(u32 m, int mantissa) {
    u32 unit = 1u << (23 - mantissa), rounded = (m + unit / 2 - 1 + (m / unit & 1u)) & -unit;
    return m > INFINITE ? NAN_BITS : m == INFINITE ? m : rounded;
}

ALWAYS u32 load(int in, const void *x, i64 i) {
    if (in == F32) return ((const u32 *)x)[i];
    if (in == BF16) return (u32)((const u16 *)x)[i] << 16;
    return half_to_float(((const u16 *)x)[i]);
}

/* A magnitude code (the input without its sign bit) as FP32 bits. */
ALWAYS u32 magnitude_bits(int in, u32 code) { return in == F32 ? code : in == BF16 ? code << 16 : half_to_float(code); }

/* The magnitude code of Inf. */
ALWAYS u32 infinite_code(int in) { return in == F32 ? INFINITE : in == BF16 ? 0x7f80u : 0x7c00u; }

#endif
