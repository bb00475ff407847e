/* kernels.c: the CPU kernels, compiled once per instruction set (simd.h). library.py builds and calls them.

   Bounds: every pointer is to a contiguous tensor of the size that its comment names, checked in Python: sizes
   where an operation is called (kernels/matmul.py …), dtype, device and contiguity in library.py. */

#define _XOPEN_SOURCE 700 /* pread, pwrite */

#include "simd.h"
#include "storage.h"
#include "quantize.h"
#include "adamw.h"
#include "adamw_pages.h"
#include "product.h"
#include "elementwise.h"
#include "matmul_large.h"
#include "matmul_small.h"
#include "dense.h"
#include "low_rank.h"
#include "attention.h"

int FOR_ISA(multiplies_pairs)(void) { return PAIRS; }

/* `count` products of one x, which differ in q, N, r, y, bias, low and up alone. */
static void products_of_one_x(const product *p, int count) {
    if (p->q && p->M <= SMALL && p->K % SMALL_GROUP == 0)
        few_rows(p, count);
    else
        for (int i = 0; i < count; i++) many_rows(p + i, 0);
}

void FOR_ISA(matmul)(const product *p) { products_of_one_x(p, 1); }

void FOR_ISA(matmul_dx)(const product *p) { many_rows(p, 1); }

#include "decode.h" /* calls the products above */
