/* One pass over a weight and its two moments: what AdamW asks of it, and what of that rounding loses (see adamw.py). */

#include <math.h>

#include "observe.h"

typedef struct { float step_size, correction, eps, decay; } numbers;
typedef struct { i64 asked, bf16, fp32, stay; } loss;   /* stay: chances of stochastic rounding, in 65536ths */

ALWAYS u32 to_bf16(u32 u) { return round_wide(u & 0x7fffffffu, 7) | (u & 0x80000000u); }

/* Updates of elements [start, stop) into u[0 ...], and what is lost of them. */
ALWAYS void update_span(int in, const void *w, const float *restrict m, const float *restrict v, i64 start, i64 stop,
                        const numbers a, float *restrict u, loss *out) {
    u32 asked = 0, bf16 = 0, fp32 = 0, stay = 0;
#pragma omp simd reduction(+ : asked, bf16, fp32, stay)
    for (i64 i = start; i < stop; i++) {
        float weight = real(load(in, w, i));
        float wanted = -(weight * a.decay) - a.step_size * m[i] / (sqrtf(v[i]) * a.correction + a.eps);
        float base = real(to_bf16(bits_of(weight))), moved = base + wanted;
        u32 moves = wanted != 0, high = bits_of(moved) >> 16, from = bits_of(base) >> 16, cut = bits_of(moved) & 0xffffu;
        u32 chance = high == from ? 65536 - cut : high + 1 == from ? cut : 0;
        u[i - start] = wanted;
        asked += moves, bf16 += moves & (real(to_bf16(bits_of(moved))) == base), fp32 += moves & (weight + wanted == weight);
        stay += moves ? chance : 0;   /* at most BLOCK * 2^16 = 2^28 */
    }
    out->asked += asked, out->bf16 += bf16, out->fp32 += fp32, out->stay += stay;
}

/* The blocks of one thread's share; `moments` and the updates go into the histograms of three requests. */
static void update_share(int in, const void *w, const float *m, const float *v, i64 first, i64 last, const numbers a,
                         const request *r, loss *out) {
    float u[BLOCK];
    partial mine[3];
    request of_updates = r[2];
    of_updates.x = u;
    for (int k = 0; k < 3; k++) observe_begin(&mine[k], &r[k]);
    for (i64 start = first; start < last; start += BLOCK) {
        i64 stop = start + BLOCK < last ? start + BLOCK : last;
        if (in == F32) update_span(F32, w, m, v, start, stop, a, u, out);
        else update_span(BF16, w, m, v, start, stop, a, u, out);
        observe_span(&mine[0], &r[0], start, stop);
        observe_span(&mine[1], &r[1], start, stop);
        observe_span(&mine[2], &of_updates, 0, stop - start);
    }
    u32 ignored = 0;
#pragma omp critical
    for (int k = 0; k < 3; k++) observe_merge(&mine[k], &r[k], &ignored);
}

/* w: n weights in FP32 or BF16; m, v: their moments; first, second, updates: histograms; lost: [5], see adamw.py. */
void mp_updates(const void *w, const float *m, const float *v, i64 n, int in, float step_size, float correction, float eps,
                float decay, i64 *first, i64 *second, i64 *updates, double *lost, int threads) {
    const numbers a = {step_size, correction, eps, decay};
    const request r[3] = {
        {.x = m, .row = n, .in = F32, .histogram = first},
        {.x = v, .row = n, .in = F32, .histogram = second},
        {.row = BLOCK, .in = F32, .histogram = updates},
    };
    const i64 blocks = (n + BLOCK - 1) / BLOCK;
    loss sums[threads];
    memset(sums, 0, sizeof sums);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int share = 0; share < threads; share++) {
        i64 begin = blocks * share / threads * BLOCK, end = blocks * (share + 1) / threads * BLOCK;
        update_share(in, w, m, v, begin, end < n ? end : n, a, r, &sums[share]);
    }
    for (int share = 0; share < threads; share++) {
        lost[0] += sums[share].asked, lost[1] += sums[share].bf16, lost[2] += sums[share].fp32;
        lost[3] += sums[share].stay / 65536.0, lost[4] += sums[share].fp32;
    }
}
