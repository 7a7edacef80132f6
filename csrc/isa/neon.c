typedef int gfl_not_empty;
#if defined(__aarch64__)
#include "../simd/neon.h"
#define GFL_TABLE gfl_neon
#include "../kernels/all.h"
#endif
