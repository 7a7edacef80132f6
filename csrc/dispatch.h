#ifndef GFL_DISPATCH_H
#define GFL_DISPATCH_H
#include "gguflora.h"
#include "kernels/table.h"

const gfl_table *gfl_table_of(int isa); /* NULL if this machine does not have it */
int gfl_index_of(int type_id);          /* place in types.def, -1 if unknown */

#endif
