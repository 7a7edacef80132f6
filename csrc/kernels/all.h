#ifndef GFL_ALL_KERNELS_H
#define GFL_ALL_KERNELS_H
#include "floats.h"
#include "rows_f32.h"
#include "search_scale.h"
#include "search_descent.h"
#include "batch.h"
#include "legacy.h"
#include "k_quants.h"
#include "k_minimum.h"
#include "k_symmetric.h"
#include "ternary.h"
#include "fp4.h"
#include "iq4.h"
#include "codebook_search.h"
#include "iq3.h"
#include "iq2.h"
#include "iq1.h"
#include "codecs.h"
#include "dither.h"
#include "codebook_codecs.h"
#include "dither_codebook.h"
#include "search_codes.h"
#include "calibrated_scales.h"
#include "sketch.h"
#include "table.h"

#ifndef GFL_TABLE
#define GFL_TABLE gfl_scalar /* opened alone */
#endif

/* Every kernel for the instruction set of lanes.h, and the table GFL_TABLE of them. */

const gfl_table GFL_TABLE = {
    .largest = largest,
    .product = product,
    .add = add,
    .add_to_sketch = add_to_sketch,
    .measure = measure_chunk,
    .measure_target = measure_target_chunk,
    .dither = dither_chunk,
    .clipped = count_clipped,
    .four_dots = four_dots,
    .measure_codebook = measure_codebook,
    .dither_codebook = dither_codebook,
    .search_row = search_row,
    .search_scales = search_scales,
    .block_codecs = block_codecs,
    .codebook_codecs = codebook_codecs,
    /* clang-format off */
    .types = {
#define GFL_TYPE(name, id, weights, block, needs_imatrix) [GFL_##name] = {quantize_##name, dequantize_##name},
#include "../types.def"
#undef GFL_TYPE
    },
    /* clang-format on */
};

#endif
