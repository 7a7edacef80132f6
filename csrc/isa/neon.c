typedef int gfl_not_empty; /* C wants a declaration in every file, also where the processor is another one */
#if defined(__aarch64__)
#include "../simd/neon.h"
#define GFL_TABLE gfl_neon
#include "../kernels/all.h"
#endif
