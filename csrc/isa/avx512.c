typedef int gfl_not_empty; /* C wants a declaration in every file, also where the processor is another one */
#if defined(__x86_64__)
#include "../simd/avx512.h"
#define GFL_TABLE gfl_avx512
#include "../kernels/all.h"
#endif
