typedef int gfl_not_empty;
#if defined(__x86_64__)
#pragma GCC target("avx2,f16c,fma,avx512f,avx512bw,avx512dq,avx512vl")
#include "../simd/avx512.h"
#define GFL_TABLE gfl_avx512
#include "../kernels/all.h"
#endif
