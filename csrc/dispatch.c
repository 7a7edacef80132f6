#include "dispatch.h"

#include <stddef.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <stdatomic.h>
#endif

#include "block_formats.h"
#include "kernels/base.h"

static const gfl_type types[GFL_N_TYPES] = {
#define GFL_TYPE(name, id, weights, block, needs_imatrix) \
    [GFL_##name] = {id, weights, (int)sizeof(block), needs_imatrix, 0, #name},
#include "types.def"
#undef GFL_TYPE
};

static const struct {
    const char *name;
    const gfl_table *table;
} isas[] = {
    {"scalar", &gfl_scalar},
#if defined(__x86_64__)
    {"avx2", &gfl_avx2},
    {"avx512", &gfl_avx512},
    {"neon", NULL},
#elif defined(__aarch64__)
    {"avx2", NULL},
    {"avx512", NULL},
    {"neon", &gfl_neon},
#else
    {"avx2", NULL},
    {"avx512", NULL},
    {"neon", NULL},
#endif
};

enum { N_ISAS = sizeof isas / sizeof *isas };

int gfl_type_count(void) { return GFL_N_TYPES; }

gfl_type gfl_type_at(int index) {
    if (index < 0 || index >= GFL_N_TYPES) return (gfl_type){-1, 0, 0, 0, 0, NULL};
    gfl_type type = types[index];
    type.supports_stochastic = gfl_scalar.block_codecs[index].pack || gfl_scalar.codebook_codecs[index].pack;
    return type;
}

int gfl_isa_count(void) { return N_ISAS; }

const char *gfl_isa_name(int isa) { return isa >= 0 && isa < N_ISAS ? isas[isa].name : NULL; }

#if defined(__x86_64__)
/* clang 14 has no such name for __builtin_cpu_supports. Every kernel asks, and on a virtual machine CPUID takes
 * microseconds, so the answer is kept; threads that ask at once store the same. */
static int has_f16c(void) {
    static atomic_int answer = -1;
    int known = atomic_load_explicit(&answer, memory_order_relaxed);
    if (known < 0) {
        unsigned a, b, c, d;
        known = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
        atomic_store_explicit(&answer, known, memory_order_relaxed);
    }
    return known;
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2") && has_f16c() && __builtin_cpu_supports("fma"); }
#endif

int gfl_isa_available(int isa) {
    if (isa < 0 || isa >= N_ISAS || !isas[isa].table) return 0;
#if defined(__x86_64__)
    if (isas[isa].table == &gfl_avx2) return has_avx2();
    if (isas[isa].table == &gfl_avx512)
        return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return 1;
}

const gfl_table *gfl_table_of(int isa) { return gfl_isa_available(isa) ? isas[isa].table : NULL; }

int gfl_index_of(int type_id) {
    for (int i = 0; i < GFL_N_TYPES; i++)
        if (types[i].id == type_id) return i;
    return -1;
}
