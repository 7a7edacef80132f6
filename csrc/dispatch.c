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
enum { HAS_AVX2 = 1, HAS_AVX512 = 2 };

/* What processor and operating system support, by CPUID and XGETBV (Intel's manual, volume 1, 14.3 and 15.2 to 15.4):
 * __builtin_cpu_supports depends on a runtime library, and zig's says no to everything. */
static int ask_processor(void) {
    const unsigned first = bit_FMA | bit_OSXSAVE | bit_AVX | bit_F16C;
    const unsigned wide = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & first) != first) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* the registers that are kept for a thread */
    if ((low & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return 0;
    return (low & 0xe6) == 0xe6 && (b & wide) == wide ? HAS_AVX2 | HAS_AVX512 : HAS_AVX2;
}

/* Every kernel asks, and on a virtual machine CPUID takes microseconds, so the answer is kept; threads that ask at once
 * store the same. */
static int has(int feature) {
    static atomic_int answer = -1;
    int known = atomic_load_explicit(&answer, memory_order_relaxed);
    if (known < 0) {
        known = ask_processor();
        atomic_store_explicit(&answer, known, memory_order_relaxed);
    }
    return (known & feature) != 0;
}
#endif

int gfl_isa_available(int isa) {
    if (isa < 0 || isa >= N_ISAS || !isas[isa].table) return 0;
#if defined(__x86_64__)
    if (isas[isa].table == &gfl_avx2) return has(HAS_AVX2);
    if (isas[isa].table == &gfl_avx512) return has(HAS_AVX512);
#endif
    return 1;
}

const gfl_table *gfl_table_of(int isa) { return gfl_isa_available(isa) ? isas[isa].table : NULL; }

int gfl_index_of(int type_id) {
    for (int i = 0; i < GFL_N_TYPES; i++)
        if (types[i].id == type_id) return i;
    return -1;
}
