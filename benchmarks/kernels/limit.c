/* The least that a random-row kernel can take on this machine: the same memory traffic, in C.

   Compiled when the benchmark runs, for the machine it runs on. `ahead` is the prefetch distance
   in rows, 0 for none. */

#include <stdint.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int64_t unaligned64 __attribute__((aligned(1), may_alias));
enum { LANES = 16, LINE = 64 };

static inline void put(float *out, vec value, int stream) {
#if defined(__AVX512F__)
    if (stream) { _mm512_stream_ps(out, (__m512)value); return; }
#elif defined(__AVX__)
    if (stream) {
        union { vec whole; __m256 half[2]; } both = {value};
        _mm256_stream_ps(out, both.half[0]);
        _mm256_stream_ps(out + 8, both.half[1]);
        return;
    }
#endif
    *(vec *)out = value;
}

static inline __attribute__((always_inline)) void ask(const char *row, int bytes, int write) {
    for (int at = 0; at < bytes; at += LINE) {
        if (write) __builtin_prefetch(row + at, 1, 3);
        else __builtin_prefetch(row + at, 0, 3);
    }
}

/* out[b] = sum of rows[ids[i]] over the bag b, in float32 and in order. */
#define SUM_BAGS(DIM)                                                                             \
    void sum_bags_##DIM(const float *rows, const int64_t *ids, const int64_t *splits,             \
                        int64_t bags, float *out, int64_t ahead, int stream) {                    \
        enum { PARTS = DIM / LANES };                                                             \
        int64_t last = splits[bags] - 1;                                                          \
        for (int64_t b = 0; b < bags; b++) {                                                      \
            vec total[PARTS];                                                                     \
            for (int p = 0; p < PARTS; p++) total[p] = (vec){0};                                  \
            for (int64_t i = splits[b]; i < splits[b + 1]; i++) {                                 \
                if (ahead) {                                                                      \
                    int64_t next = i + ahead < last ? i + ahead : last;                           \
                    ask((const char *)(rows + ids[next] * DIM), 4 * DIM, 0);                      \
                }                                                                                 \
                const float *row = rows + ids[i] * DIM;                                           \
                for (int p = 0; p < PARTS; p++) total[p] += *(const vec *)(row + p * LANES);      \
            }                                                                                     \
            for (int p = 0; p < PARTS; p++) put(out + b * DIM + p * LANES, total[p], stream);     \
        }                                                                                         \
        __sync_synchronize();                                                                     \
    }

SUM_BAGS(16)
SUM_BAGS(64)
SUM_BAGS(128)

/* As many bytes read and written as for bags of narrow rows, and an addition of their bits. */
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));
#define READ_BAGS(BYTES, DIM)                                                                     \
    void read_bags_##BYTES##_##DIM(const char *rows, const int64_t *ids, const int64_t *splits,   \
                                   int64_t bags, float *out, int64_t ahead, int stream) {         \
        enum { PARTS = DIM / LANES, FULL = BYTES / LINE };                                        \
        int64_t last = splits[bags] - 1;                                                          \
        for (int64_t b = 0; b < bags; b++) {                                                      \
            ivec total[PARTS];                                                                    \
            int64_t rest = 0;                                                                     \
            for (int p = 0; p < PARTS; p++) total[p] = (ivec){0};                                 \
            for (int64_t i = splits[b]; i < splits[b + 1]; i++) {                                 \
                if (ahead) {                                                                      \
                    int64_t next = i + ahead < last ? i + ahead : last;                           \
                    ask(rows + ids[next] * BYTES, BYTES, 0);                                      \
                    if (BYTES % LINE) __builtin_prefetch(rows + ids[next] * BYTES + BYTES - 1);   \
                }                                                                                 \
                const char *row = rows + ids[i] * BYTES;                                          \
                for (int p = 0; p < FULL; p++) total[p % PARTS] += *(const ivec *)(row + p * LINE); \
                if (BYTES % LINE) rest += *(const unaligned64 *)(row + BYTES - 8);                \
            }                                                                                     \
            total[0][0] += (int32_t)rest;                                                         \
            for (int p = 0; p < PARTS; p++) put(out + b * DIM + p * LANES, (vec)total[p], stream); \
        }                                                                                         \
        __sync_synchronize();                                                                     \
    }

READ_BAGS(72, 64)
READ_BAGS(128, 64)
READ_BAGS(136, 128)
READ_BAGS(256, 128)

/* Read and write back records of COUNT rows of 64 side by side: a row and its optimizer's slots. */
#define TOUCH_RECORDS(COUNT)                                                                      \
    void touch_records_##COUNT(float *records, const int64_t *ids, int64_t n, const float *grads, \
                               int64_t ahead, int write) {                                        \
        enum { DIM = 64, PARTS = DIM / LANES, SIZE = COUNT * DIM };                               \
        for (int64_t i = 0; i < n; i++) {                                                         \
            if (ahead) {                                                                          \
                int64_t next = i + ahead < n ? i + ahead : n - 1;                                 \
                ask((const char *)(grads + next * DIM), 4 * DIM, 0);                              \
                ask((const char *)(records + ids[next] * SIZE), 4 * SIZE, write);                 \
            }                                                                                     \
            float *row = records + ids[i] * SIZE;                                                 \
            vec grad[PARTS];                                                                      \
            for (int p = 0; p < PARTS; p++) grad[p] = *(const vec *)(grads + i * DIM + p * LANES); \
            for (int p = 0; p < COUNT * PARTS; p++) *(vec *)(row + p * LANES) += grad[p % PARTS]; \
        }                                                                                         \
    }

TOUCH_RECORDS(2)
TOUCH_RECORDS(3)
