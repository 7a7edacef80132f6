/* All families over the simd header included before; defines the table GFL_TABLE. */
#include "../blocks.h"
#include "../grids.h"
#include "../moves.h"
#include "table.h"

#include "rows_f32.h"
#include "floats.h"
#include "fit.h"
#include "batch.h"
#include "plain.h"
#include "k_quants.h"
#include "k_minimum.h"
#include "k_symmetric.h"
#include "ternary.h"
#include "fp4.h"
#include "iq4.h"
#include "grid.h"
#include "iq3.h"
#include "iq2.h"
#include "iq1.h"
#include "views.h"
#include "dither.h"
#include "vector_views.h"
#include "vectors.h"

const gfl_table GFL_TABLE = {
    .largest = largest,
    .product = product,
    .add = add,
    .measure = measure_chunk,
    .measure_target = measure_target_chunk,
    .dither = dither_chunk,
    .clipped = count_clipped,
    .four_dots = four_dots,
    .measure_vectors = measure_vectors,
    .dither_vectors = dither_vectors,
    .views = views,
    .vector_views = vector_views,
    .types = {
#define GFL_TYPE(name, id, weights, block, needs_imatrix) [GFL_##name] = {quantize_##name, dequantize_##name},
#include "../types.def"
#undef GFL_TYPE
    },
};
