#include "../simd/scalar.h"
#define GFL_TABLE gfl_scalar
#include "../kernels/all.h"
