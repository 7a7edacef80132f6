typedef int gfl_not_empty; /* C wants a declaration in every file, also where the processor is another one */
#if defined(__x86_64__)
#if defined(__clang__) /* it has no #pragma GCC target, and what the headers of the system declare must not get this */
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma"))), apply_to = function)
#endif
#include "../simd/avx2.h"
#define GFL_TABLE gfl_avx2
#include "../kernels/all.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
