/* Exponents of the maxima of blocks, which a format with one scale for a block (MX) would choose it by. */

#include "observe.h"

/* Blocks of 32 and of 128 elements: one of 128 and the up to four of 32 in it. */
static void count_block(i64 (*tables)[2][256], int in, const void *x, i64 start, i64 stop) {
    u32 all = 0;
    for (i64 first = start; first < stop; first += 32) {
        u32 here = largest(in, x, first, first + 32 < stop ? first + 32 : stop);
        tables[(first - start) / 32][0][magnitude_bits(in, here) >> 23]++;
        all = here > all ? here : all;
    }
    tables[0][1][magnitude_bits(in, all) >> 23]++;
}

#ifdef __AVX512BW__

#include <immintrin.h>

#define MOST(a, b) (in == F32 ? _mm512_max_epu32(a, b) : _mm512_max_epu16(a, b))

/* Maxima of a block of 32: FP32 in 16 lanes, the others in 32. */
ALWAYS __m512i maxima(int in, const void *x, i64 i) {
    if (in != F32) return _mm512_and_si512(_mm512_loadu_si512((const u16 *)x + i), _mm512_set1_epi16(0x7fff));
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), *p = (const void *)((const u32 *)x + i);
    return _mm512_max_epu32(_mm512_and_si512(_mm512_loadu_si512(p), magnitude),
                            _mm512_and_si512(_mm512_loadu_si512(p + 1), magnitude));
}

/* Four blocks of 32, one in each lane of every quarter: two steps of a transpose that keeps only the larger half. */
ALWAYS __m512i four(int in, const void *x, i64 i) {
    __m512i a = maxima(in, x, i), b = maxima(in, x, i + 32), c = maxima(in, x, i + 64), d = maxima(in, x, i + 96);
    __m512i ab = MOST(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = MOST(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return MOST(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

ALWAYS void store_exponents(int in, __m512i codes, u32 *out) {
    if (in == F16) codes = _mm512_castps_si512(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(codes)));
    _mm512_storeu_si512(out, _mm512_srli_epi32(codes, in == BF16 ? 7 : 23));
}

/* 512 elements: the exponents of 16 blocks of 32 and of 4 of 128. */
ALWAYS void count_sixteen(i64 (*tables)[2][256], int in, const void *x, i64 i) {
    __m512i p = four(in, x, i), q = four(in, x, i + 128), r = four(in, x, i + 256), s = four(in, x, i + 384);
    __m512i pq = MOST(_mm512_shuffle_i64x2(p, q, 0x44), _mm512_shuffle_i64x2(p, q, 0xee));
    __m512i rs = MOST(_mm512_shuffle_i64x2(r, s, 0x44), _mm512_shuffle_i64x2(r, s, 0xee));
    __m512i all = MOST(_mm512_shuffle_i64x2(pq, rs, 0x88), _mm512_shuffle_i64x2(pq, rs, 0xdd));
    if (in != F32) {
        all = _mm512_max_epu16(all, _mm512_srli_epi32(all, 16));
        all = _mm512_and_si512(all, _mm512_set1_epi32(0xffff));
    }
    __m512i wide = _mm512_max_epu32(all, _mm512_shuffle_epi32(all, 0x4e));
    wide = _mm512_max_epu32(wide, _mm512_shuffle_epi32(wide, 0xb1));
    u32 small[16], large[16];
    store_exponents(in, all, small), store_exponents(in, wide, large);
    for (int k = 0; k < 16; k++) tables[k % 4][0][small[k]]++;
    for (int k = 0; k < 4; k++) tables[k][1][large[4 * k]]++;
}

static i64 count_whole(i64 (*tables)[2][256], int in, const void *x, i64 start, i64 stop) {
    for (; start + 512 <= stop; start += 512)
        if (in == F32) count_sixteen(tables, F32, x, start);
        else if (in == BF16) count_sixteen(tables, BF16, x, start);
        else count_sixteen(tables, F16, x, start);
    return start;
}

#else

static i64 count_whole(i64 (*tables)[2][256], int in, const void *x, i64 start, i64 stop) {
    (void)tables, (void)in, (void)x, (void)stop;
    return start;
}

#endif

/* Blocks that begin in [start, stop), which begins and ends with a row or a block of 128. */
void count_blocks(i64 (*tables)[2][256], int in, const void *x, i64 start, i64 stop, i64 row) {
    while (start < stop) {
        i64 left = row - start % row, end = left < stop - start ? start + left : stop;
        start = count_whole(tables, in, x, start, end);
        for (; start < end; start += 128) count_block(tables, in, x, start, start + 128 < end ? start + 128 : end);
        start = end;
    }
}
