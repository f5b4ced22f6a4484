/* The arithmetic of kernel.py for float32, float16 and bfloat16, in one pass over memory. Optional: where this was not
 * compiled, numpy does the same operations on whole arrays, and gives the same bits (tests/run/test_native.py).
 *
 *     r = b - alpha * (t - o)     each operation rounded to float32: compile with -ffp-contract=off, never -ffast-math
 *
 * then one rounding to nearest-even. Blocks of 1024 elements stay in the first-level cache; every loop is branch-free, so
 * that the compiler vectorises it for the processor it finds at run time. */
#include <stdint.h>
#include <string.h>

enum { F32 = 0, F16 = 1, BF16 = 2 };                   /* as in native.py */
enum { DENSE = 0, GIVEN = 1 };                         /* delta = tuned - origin, or a float32 array with alpha in it */
enum { INTENDED, CHANGED, OVERFLOWED, NONFINITE };     /* counts */
enum { BLOCK = 1024, STRIP = 512 };                  /* elements; a strip of 16 ranks fits the first-level cache too */

typedef struct {
    int32_t kind, tuned_dtype, origin_dtype;           /* origin_dtype of a NULL origin is not read */
    float alpha;
    const char *tuned, *origin;                        /* origin NULL: base */
} Term;

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
INLINE int width_of(int dtype) { return dtype == F32 ? 4 : 2; }

INLINE void decode(const char *from, int dtype, int n, float *out) {
    const uint16_t *half = (const uint16_t *)from;
    if (dtype == F32) {
        memcpy(out, from, 4 * (size_t)n);
    } else if (dtype == BF16) {
        for (int i = 0; i < n; i++) out[i] = float_of((uint32_t)half[i] << 16);
    } else {
        for (int i = 0; i < n; i++) { /* exponent moved into place, 112 too small; inf and NaN get theirs back */
            uint32_t u = half[i], magnitude = (u & 0x7FFF) << 13, sign = (u & 0x8000) << 16;
            uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
            uint32_t special = magnitude | 0x7F800000;
            out[i] = float_of((magnitude >= 0x0F800000 ? special : scaled) | sign);
        }
    }
}

/* One rounding to nearest-even; a NaN comes out as any bits, the caller repairs it. */
INLINE void encode(const float *values, int dtype, int n, char *to) {
    uint16_t *half = (uint16_t *)to;
    if (dtype == F32) {
        memcpy(to, values, 4 * (size_t)n);
    } else if (dtype == BF16) {
        for (int i = 0; i < n; i++) {
            uint32_t u = bits_of(values[i]);
            half[i] = (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
        }
    } else {
        for (int i = 0; i < n; i++) { /* adding and taking away 2^(e+13) rounds at float16's last bit */
            uint32_t u = bits_of(values[i]), sign = (u >> 16) & 0x8000;
            float x = float_of(u & 0x7FFFFFFF);
            x = x < 65536.0f ? x : 65536.0f;
            uint32_t e = bits_of(x) & 0x7F800000;
            e = e > 0x38800000 ? e : 0x38800000; /* 2^-14: below it the grid is that of subnormals */
            float magic = float_of(e + (13u << 23));
            x = (x + magic) - magic;
            half[i] = (uint16_t)((bits_of(x * 0x1p-112f) >> 13) | sign);
        }
    }
}

INLINE uint32_t word(const char *at, int dtype, int i) {
    return dtype == F32 ? ((const uint32_t *)at)[i] : ((const uint16_t *)at)[i];
}

INLINE void put(char *at, int dtype, int i, uint32_t bits) {
    if (dtype == F32) ((uint32_t *)at)[i] = bits;
    else ((uint16_t *)at)[i] = (uint16_t)bits;
}

INLINE int is_nan(float x) { return (bits_of(x) & 0x7FFFFFFF) > 0x7F800000; }
INLINE int is_finite(float x) { return (bits_of(x) & 0x7F800000) != 0x7F800000; }

INLINE int word_is_finite(uint32_t bits, int dtype) {
    uint32_t exponent = dtype == F32 ? 0x7F800000 : dtype == BF16 ? 0x7F80 : 0x7C00;
    return (bits & exponent) != exponent;
}

/* The rare block with an inf or NaN in its result: base's bits where nothing was to change, the canonical NaN elsewhere. */
static void repair(const Term *terms, int count, int64_t at, int n, const float *base, const float *values,
                   const uint32_t *touched, const char *reference, char *out, int dtype, int64_t *counts) {
    const uint32_t canonical = dtype == F32 ? 0x7FC00000 : dtype == BF16 ? 0x7FC0 : 0x7E00;
    for (int i = 0; i < n; i++) {
        if (!touched[i] || (is_nan(values[i]) && is_nan(base[i]))) put(out, dtype, i, word(reference, dtype, i));
        else if (is_nan(values[i])) put(out, dtype, i, canonical);
        if (word_is_finite(word(out, dtype, i), dtype)) continue;
        int finite = is_finite(base[i]);
        for (int k = 0; k < count && finite; k++) {
            if (terms[k].kind != DENSE) continue;
            float tuned, origin;
            decode(terms[k].tuned + (at + i) * width_of(terms[k].tuned_dtype), terms[k].tuned_dtype, 1, &tuned);
            finite = is_finite(tuned);
            if (terms[k].origin == NULL) continue;
            decode(terms[k].origin + (at + i) * width_of(terms[k].origin_dtype), terms[k].origin_dtype, 1, &origin);
            finite = finite && is_finite(origin);
        }
        counts[NONFINITE]++;
        counts[OVERFLOWED] += finite;
    }
}

/* What native.py expects: a library left over from another version is not used. */
int taskvec_abi(void) { return 2; }

/* out = left @ right, [rows, columns]; left: [rows, rank] by rows, right: [rank, columns] of a larger array with `stride`
 * elements a row. Every element is ((0 + l0*r0) + l1*r1) + ..., each operation rounded: the same bits on every machine,
 * which no BLAS promises. Eight products at a time, so that the sums stay in registers. */
FOR_EVERY_PROCESSOR
void taskvec_product(int64_t rows, int64_t columns, int64_t rank, const float *left, const float *right, int64_t stride,
                     float *out) {
    for (int64_t at = 0; at < columns; at += STRIP) {
        const int n = columns - at < STRIP ? (int)(columns - at) : STRIP;
        for (int64_t row = 0; row < rows; row++) {
            const float *l = left + row * rank;
            float *restrict sum = out + row * columns + at;
            memset(sum, 0, sizeof(float) * (size_t)n);
            int64_t k = 0;
            for (; k + 8 <= rank; k += 8) {
                const float *r = right + k * stride + at;
                for (int i = 0; i < n; i++) {
                    float s = sum[i];
                    s += l[k] * r[i];
                    s += l[k + 1] * r[stride + i];
                    s += l[k + 2] * r[2 * stride + i];
                    s += l[k + 3] * r[3 * stride + i];
                    s += l[k + 4] * r[4 * stride + i];
                    s += l[k + 5] * r[5 * stride + i];
                    s += l[k + 6] * r[6 * stride + i];
                    s += l[k + 7] * r[7 * stride + i];
                    sum[i] = s;
                }
            }
            for (; k < rank; k++)
                for (int i = 0; i < n; i++) sum[i] += l[k] * right[k * stride + at + i];
        }
    }
}

/* base and out: `size` elements; counts: 4 numbers, added to. */
FOR_EVERY_PROCESSOR
void taskvec_edit(int64_t size, const char *base_bytes, int base_dtype, char *out_bytes, int out_dtype, const Term *terms,
                  int count, int64_t *counts) {
    float base[BLOCK], values[BLOCK], tuned[BLOCK], origin[BLOCK];
    uint32_t touched[BLOCK], differs[BLOCK];
    _Alignas(64) char cast[BLOCK * 4];
    const float limit = out_dtype == F16 ? 65520.0f : out_dtype == BF16 ? 3.39617752923046e38f : __builtin_inff();
    for (int64_t at = 0; at < size; at += BLOCK) {
        const int n = size - at < BLOCK ? (int)(size - at) : BLOCK;
        const char *stored = base_bytes + at * width_of(base_dtype), *reference = stored;
        char *out = out_bytes + at * width_of(out_dtype);
        decode(stored, base_dtype, n, base);
        memcpy(values, base, sizeof(float) * (size_t)n);
        memset(touched, 0, sizeof touched);
        for (int k = 0; k < count; k++) {
            const Term *term = &terms[k];
            if (term->kind == GIVEN) {
                const float *delta = (const float *)term->tuned + at;
                for (int i = 0; i < n; i++) touched[i] |= delta[i] != 0.0f;
                for (int i = 0; i < n; i++) values[i] = values[i] - delta[i];
                continue;
            }
            const float *from = base;
            decode(term->tuned + at * width_of(term->tuned_dtype), term->tuned_dtype, n, tuned);
            if (term->origin != NULL) {
                decode(term->origin + at * width_of(term->origin_dtype), term->origin_dtype, n, origin);
                from = origin;
            }
            for (int i = 0; i < n; i++) differs[i] = bits_of(tuned[i]) != bits_of(from[i]);
            if (term->tuned_dtype != (term->origin != NULL ? term->origin_dtype : base_dtype))
                for (int i = 0; i < n; i++) /* dtypes disagree on the payload of a NaN */
                    differs[i] &= !(is_nan(tuned[i]) & is_nan(from[i]));
            for (int i = 0; i < n; i++) touched[i] |= differs[i];
            /* a negative alpha negates the difference instead: the same bits, but zero stays +0 and so base's -0 stays */
            const float alpha = term->alpha < 0 ? -term->alpha : term->alpha;
            if (term->alpha < 0)
                for (int i = 0; i < n; i++) tuned[i] = from[i] - tuned[i];
            else
                for (int i = 0; i < n; i++) tuned[i] = tuned[i] - from[i];
            for (int i = 0; i < n; i++) /* inf - inf is no change either */
                tuned[i] = float_of(bits_of(tuned[i]) & (0u - differs[i]));
            for (int i = 0; i < n; i++) values[i] = values[i] - alpha * tuned[i];
        }
        if (out_dtype != base_dtype) {
            encode(base, out_dtype, n, cast);
            for (int i = 0; i < n; i++)
                if (is_nan(base[i])) put(cast, out_dtype, i, out_dtype == F32 ? 0x7FC00000 : out_dtype == BF16 ? 0x7FC0 : 0x7E00);
            reference = cast;
        }
        encode(values, out_dtype, n, out);
        uint32_t intended = 0, changed = 0, beyond = 0;
        for (int i = 0; i < n; i++) intended += touched[i];
        for (int i = 0; i < n; i++) beyond |= !(float_of(bits_of(values[i]) & 0x7FFFFFFF) < limit);
        if (beyond) repair(terms, count, at, n, base, values, touched, reference, out, out_dtype, counts);
        if (out_dtype == F32)
            for (int i = 0; i < n; i++) changed += ((const uint32_t *)out)[i] != ((const uint32_t *)reference)[i];
        else
            for (int i = 0; i < n; i++) changed += ((const uint16_t *)out)[i] != ((const uint16_t *)reference)[i];
        counts[INTENDED] += intended;
        counts[CHANGED] += changed;
    }
}
