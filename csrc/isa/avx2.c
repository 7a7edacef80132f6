typedef int gfl_not_empty;
#if defined(__x86_64__)
#pragma GCC target("avx2,f16c,fma")
#include "../simd/avx2.h"
#define GFL_TABLE gfl_avx2
#include "../kernels/all.h"
#endif
