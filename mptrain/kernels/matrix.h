#ifndef MPTRAIN_MATRIX_H
#define MPTRAIN_MATRIX_H

#include "common.h"

/* A part of a matrix [rows, cols]. */
typedef struct { i64 top, bottom, left, right; } part;

SHARED void transpose_part(const u16 *x, i64 rows, i64 cols, const part p, u16 *out);

#endif
