/* AMX's tiles, eight registers of up to 16 rows of 64 bytes, by number. By hand, since compilers allot tiles themselves
 * otherwise. Tests put C in place of these instructions. */
#ifndef TILE_DOT

/* Shapes, as the instruction reads them (TileShapes in vector/linear_matrix.c). All tiles become zero. */
#define TILE_CONFIGURE(shapes) __asm__ volatile("ldtilecfg (%0)" : : "r"(shapes) : "memory")
#define TILE_RELEASE() __asm__ volatile("tilerelease")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile : : : "memory")
/* Rows that are `stride` bytes apart, written before the last TILE_ZERO, TILE_STORE or TILE_WRITTEN. */
#define TILE_LOAD(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((int64_t)(stride)))
#define TILE_STORE(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((int64_t)(stride)) : "memory")
/* To each sum of 32 bits: 4 signed bytes of a row of `a` times 4 unsigned ones of a row of `b`, over all rows of `b`. */
#define TILE_DOT(sum, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #sum : :)

/* To each float: 2 numbers of bfloat16 of a row of `a` times 2 of a row of `b`, over all rows of `b`. Sums of the first and
 * of the second products are made apart, and then added to it. */
#define TILE_DOT_BFLOAT16(sum, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum : :)
/* What was written before is there for TILE_LOAD. */
#define TILE_WRITTEN() __asm__ volatile("" : : : "memory")

#endif

#define MATRIX_TILES
