/* The instruction set that a kernel is compiled for. Kernels are written in the vocabulary of simd/scalar.h, where the
 * meaning of every name is fixed; the files of isa/ include one of the simd headers before them. A header that is
 * opened alone, as by an editor, takes the scalar one. */
#ifndef GFL_SIMD_H
#include "../simd/scalar.h"
#endif
