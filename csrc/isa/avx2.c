typedef int gfl_not_empty; /* C wants a declaration in every file, also where the processor is another one */
#if defined(__x86_64__)
#include "../simd/avx2.h"
#define GFL_TABLE gfl_avx2
#include "../kernels/all.h"
#endif
