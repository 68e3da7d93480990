#include "vectors.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "exponential.h"
#include "../rows.h"
#include "../linear.h"
#include "../scratch.h"

enum {
    TILE_ROWS = 6, /* with 4 panels: 24 sums, 4 weights and 1 activation in 32 registers */
    FEWER_ROWS = 4,
    CHANNEL_PANELS = 4,
    BLOCK_PANELS = 2,     /* each has one sum per block and one over all blocks */
    QUANTIZED_ROWS = 8,   /* rows of a task that quantizes activations */
    MULTIPLIED_ROWS = 96, /* rows of a task that multiplies: they fit in the cache of a core */
};

/* Quantized rows that are multiplied together: one per row of the call, or two where its quantization error is quantized
 * as well. */
typedef struct {
    int64_t from, end; /* quantized rows */
    int64_t row;       /* of the call: the first */
    bool twice;
} Part;

typedef struct {
    const LinearParams *params;
    const LinearCall *call;
    int8_t *activations; /* [quantized rows, row_bytes] */
    float *scales;       /* [quantized rows, row_scales] */
    int32_t *sums;       /* the same */
    float *scratch;      /* [row tasks, row_bytes] */
    int64_t *places;     /* [rows + 1]: the first quantized row of each row */
    Part *parts;
    int64_t width; /* panels of a task */
    size_t groups; /* tasks that cover the panels */
} LinearWork;

/* exp(-x) */
INLINE __m512 exp_less(__m512 x) { return exp2_lanes(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f))); }

/* erf(x), Abramowitz and Stegun 7.1.26 (1964): within 1.5e-7. */
INLINE __m512 erf16(__m512 x)
{
    const __m512 sign = _mm512_set1_ps(-0.f);
    __m512 z = _mm512_andnot_ps(sign, x);
    __m512 t = _mm512_div_ps(_mm512_set1_ps(1.f), _mm512_fmadd_ps(z, _mm512_set1_ps(.3275911f), _mm512_set1_ps(1.f)));
    __m512 p = _mm512_set1_ps(1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(.254829592f));
    __m512 e = exp_less(_mm512_mul_ps(z, z));
    __m512 r = _mm512_fnmadd_ps(_mm512_mul_ps(p, t), e, _mm512_set1_ps(1.f));
    return _mm512_or_ps(r, _mm512_and_ps(sign, x));
}

/* Activation functions, defined as in their papers. */
INLINE __m512 activate(Gate gate, __m512 x)
{
    const __m512 one = _mm512_set1_ps(1.f);
    if (gate == GATE_RELU)
        return _mm512_max_ps(x, _mm512_setzero_ps());
    if (gate == GATE_GELU) {
        __m512 e = erf16(_mm512_mul_ps(x, _mm512_set1_ps(.70710678f)));
        return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(.5f)), _mm512_add_ps(e, one));
    }
    if (gate == GATE_GELU_TANH) {
        __m512 cubic = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, _mm512_set1_ps(.044715f)));
        __m512 t = tanh_lanes(_mm512_mul_ps(_mm512_add_ps(x, cubic), _mm512_set1_ps(.79788456f)));
        return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(.5f)), _mm512_add_ps(t, one));
    }
    return _mm512_div_ps(x, _mm512_add_ps(one, exp_less(x)));
}

/* Stores 16 outputs of a row, starting at 16 * column, out of `count`. */
INLINE void put(const LinearWork *work, int64_t row, int64_t column, int64_t count, __m512 value)
{
    const int64_t first = column * LANES;
    const __mmask16 mask = lanes(count - first);
    const LinearCall *call = work->call;
    if (call->residual != NULL)
        value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, call->residual + row * count + first));
    _mm512_mask_storeu_ps(call->y + row * count + first, mask, value);
}

INLINE __m512 bias(const LinearWork *work, int64_t first, int64_t end)
{
    const float *values = work->call->bias;
    return values == NULL ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(lanes(end - first), values + first);
}

/* Turns the sums of a tile into outputs, of rows from `out` on. Gate panels come in pairs. With `twice`, pairs of rows are added. */
INLINE void finish(const int rows, const int width, const bool twice, const LinearWork *work, int64_t out, int64_t panel,
                   __m512 (*product)[CHANNEL_PANELS])
{
    const LinearParams *params = work->params;
    const int64_t count = half_outputs(params);
    const int each = twice ? 2 : 1;
    if (twice)
        UNROLL
        for (int r = 0; r < rows; r += 2)
            UNROLL
            for (int p = 0; p < width; p++)
                product[r / 2][p] = _mm512_add_ps(product[r][p], product[r + 1][p]);
    if (params->gate != GATE_NONE) {
        UNROLL
        for (int p = 0; p + 1 < width; p += 2) {
            const int64_t column = (panel + p) / 2;
            const __m512 low = bias(work, column * LANES, count), high = bias(work, count + column * LANES, 2 * count);
            UNROLL
            for (int r = 0; r < rows / each; r++) {
                __m512 gate = activate(params->gate, _mm512_add_ps(product[r][p], low));
                put(work, out + r, column, count, _mm512_mul_ps(gate, _mm512_add_ps(product[r][p + 1], high)));
            }
        }
        return;
    }
    UNROLL
    for (int p = 0; p < width; p++) {
        const __m512 added = bias(work, (panel + p) * LANES, count);
        UNROLL
        for (int r = 0; r < rows / each; r++)
            put(work, out + r, panel + p, count, _mm512_add_ps(product[r][p], added));
    }
}

/* Each sum of a tile is a variable of its own, SUM(row, panel): compilers keep arrays of them in memory. */
#define SUM(r, p) sum_##r##_##p
#define SUMS(r) __m512i SUM(r, 0) = zero, SUM(r, 1) = zero, SUM(r, 2) = zero, SUM(r, 3) = zero
#define ADD(r, p, weights) \
    if (p < width)         \
    ADD_DOT(SUM(r, p), weights##p, activation)
#define ADD_ROW(r, at, weights)                                \
    if (r < rows) {                                            \
        __m512i activation = four_inputs(a + r * stride + at); \
        ADD(r, 0, weights);                                    \
        ADD(r, 1, weights);                                    \
        ADD(r, 2, weights);                                    \
        ADD(r, 3, weights);                                    \
    }
#define ADD_ROWS(at, weights)   \
    do {                        \
        ADD_ROW(0, at, weights) \
        ADD_ROW(1, at, weights) \
        ADD_ROW(2, at, weights) \
        ADD_ROW(3, at, weights) \
        ADD_ROW(4, at, weights) \
        ADD_ROW(5, at, weights) \
    } while (0)
#define KEEP(r)                                             \
    if (r < rows) {                                         \
        sums[r][0] = SUM(r, 0);                             \
        if (width > 1)                                      \
            sums[r][1] = SUM(r, 1);                         \
        if (width > 2)                                      \
            sums[r][2] = SUM(r, 2), sums[r][3] = SUM(r, 3); \
    }

INLINE __m512i four_inputs(const int8_t *values)
{
    int32_t four;
    memcpy(&four, values, sizeof four);
    return _mm512_set1_epi32(four);
}

/* Integer sums of a tile over inputs `from` to `end`: rows are `stride` bytes apart, panels `apart`. With `pairs` each
 * step takes 8 inputs of at most 2 panels; a single row then has two sums, so that steps do not wait for each other. The
 * panels that come next are fetched on the way: processors do not fetch ahead across pages by themselves. */
INLINE void add_products(const int rows, const int width, const int bits, const bool pairs, const int8_t *a,
                         int64_t stride, const uint8_t *b, int64_t apart, int64_t from, int64_t end,
                         __m512i (*sums)[CHANNEL_PANELS])
{
    const __m512i zero = _mm512_setzero_si512(), low_half = _mm512_set1_epi8(15);
    SUMS(0);
    SUMS(1);
    SUMS(2);
    SUMS(3);
    SUMS(4);
    SUMS(5);
    __m512i w0 = zero, w1 = zero, w2 = zero, w3 = zero, next0 = zero, next1 = zero;
    const __m512i next2 = zero, next3 = zero;
    for (int64_t i = from; i < end; i += pairs ? 8 : 4) {
        const uint8_t *at = b + i * (bits == 4 ? 8 : 16);
        w0 = _mm512_loadu_si512(at);
        UNROLL
        for (int p = width; p < 2 * width; p++)
            for (int part = 0; part < (pairs && bits == 8 ? 2 : 1); part++)
                __builtin_prefetch(at + p * apart + part * BYTES, 0, 2);
        if (width > 1)
            w1 = _mm512_loadu_si512(at + apart);
        if (width > 2)
            w2 = _mm512_loadu_si512(at + 2 * apart), w3 = _mm512_loadu_si512(at + 3 * apart);
        if (bits == 4) {
            next0 = _mm512_and_si512(_mm512_srli_epi16(w0, 4), low_half);
            next1 = _mm512_and_si512(_mm512_srli_epi16(w1, 4), low_half);
            w0 = _mm512_and_si512(w0, low_half), w1 = _mm512_and_si512(w1, low_half);
        } else if (pairs) {
            next0 = _mm512_loadu_si512(at + BYTES);
            if (width > 1)
                next1 = _mm512_loadu_si512(at + apart + BYTES);
        }
        ADD_ROWS(i, w);
        if (pairs && rows == 1) {
            __m512i activation = four_inputs(a + i + 4);
            ADD(1, 0, next);
            ADD(1, 1, next);
        } else if (pairs) {
            ADD_ROWS(i + 4, next);
        }
    }
    if (pairs && rows == 1)
        SUM(0, 0) = _mm512_add_epi32(SUM(0, 0), SUM(1, 0)), SUM(0, 1) = _mm512_add_epi32(SUM(0, 1), SUM(1, 1));
    KEEP(0) KEEP(1) KEEP(2) KEEP(3) KEEP(4) KEEP(5)
}

/* One tile: `rows` rows times `width` panels. Weights are unsigned: the zero point times the sum of the activations is
 * subtracted from each block's sum. Sums of a block are integers, and blocks are added in order, so the result of a row
 * does not depend on the tile. */
INLINE void linear_tile(const int rows, const int width, const int bits, const bool channel, const bool twice,
                 const LinearWork *work, int64_t row, int64_t out, int64_t panel)
{
    const LinearParams *params = work->params;
    const LinearCall *call = work->call;
    const int64_t blocks = channel ? 1 : row_scales(&params->row), stride = panel_bytes(params);
    const int64_t inputs = channel ? (params->row.inputs + 3) / 4 * 4 : params->row.block;
    const uint8_t *b = call->weights + panel * stride;
    const int8_t *a = work->activations + row * row_bytes(&params->row);
    __m512 product[TILE_ROWS][CHANNEL_PANELS];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int p = 0; p < width; p++)
            product[r][p] = _mm512_setzero_ps();
    for (int64_t block = 0; block < blocks; block++) {
        __m512i sum[TILE_ROWS][CHANNEL_PANELS];
        add_products(rows, width, bits, bits == 4 || (rows == 1 && !channel), a, row_bytes(&params->row), b, stride,
                     block * inputs, (block + 1) * inputs, sum);
        UNROLL
        for (int p = 0; p < width; p++) {
            const int64_t place = ((panel + p) * blocks + block) * LANES;
            const __m512 scale = _mm512_loadu_ps(call->scales + place);
            const int32_t middle = bits == 4 ? 8 : 128;
            const bool own_zeros = !channel && call->zero_points != NULL;
            __m512i zeros = _mm512_setzero_si512();
            if (own_zeros)
                zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(call->zero_points + place)));
            UNROLL
            for (int r = 0; r < rows; r++) {
                const int64_t at = (row + r) * blocks + block;
                const int32_t total = work->sums[at];
                __m512i offset = own_zeros ? _mm512_mullo_epi32(zeros, _mm512_set1_epi32(total))
                                           : _mm512_set1_epi32(middle * total);
                __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[r][p], offset));
                __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(work->scales[at]));
                product[r][p] = channel ? _mm512_mul_ps(whole, both) : _mm512_fmadd_ps(whole, both, product[r][p]);
            }
        }
    }
    finish(rows, width, twice, work, out, panel, product);
}

/* The rows of a part times `width` panels, in tiles of a few sizes. */
INLINE void strip(const int width, const int bits, const bool channel, const bool twice, const LinearWork *work,
                  const Part *part, int64_t panel)
{
    const int small = twice ? 2 : 3, smallest = twice ? 2 : 1, each = twice ? 2 : 1;
    int64_t row = part->from, out = part->row;
    for (; row + TILE_ROWS <= part->end; row += TILE_ROWS, out += TILE_ROWS / each)
        linear_tile(TILE_ROWS, width, bits, channel, twice, work, row, out, panel);
    for (; row + FEWER_ROWS <= part->end; row += FEWER_ROWS, out += FEWER_ROWS / each)
        linear_tile(FEWER_ROWS, width, bits, channel, twice, work, row, out, panel);
    for (; row + small <= part->end; row += small, out += small / each)
        linear_tile(small, width, bits, channel, twice, work, row, out, panel);
    for (; row < part->end; row += smallest, out++)
        linear_tile(smallest, width, bits, channel, twice, work, row, out, panel);
}

typedef void Strip(const LinearWork *work, const Part *part, int64_t panel);

#define STRIP(name, width, bits, channel, twice)                        \
    static void name(const LinearWork *work, const Part *part, int64_t panel) \
    {                                                                   \
        strip(width, bits, channel, twice, work, part, panel);          \
    }
STRIP(channel_4, 4, 8, true, false)
STRIP(channel_2, 2, 8, true, false)
STRIP(channel_1, 1, 8, true, false)
STRIP(twice_4, 4, 8, true, true)
STRIP(twice_2, 2, 8, true, true)
STRIP(twice_1, 1, 8, true, true)
STRIP(eight_2, 2, 8, false, false)
STRIP(eight_1, 1, 8, false, false)
STRIP(four_2, 2, 4, false, false)
STRIP(four_1, 1, 4, false, false)

/* For each quantization: strips of 4 panels (NULL if the sums do not fit in registers), 2 and 1. */
static Strip *const CHANNEL[] = {channel_4, channel_2, channel_1}, *const TWICE[] = {twice_4, twice_2, twice_1};
static Strip *const EIGHT[] = {NULL, eight_2, eight_1}, *const FOUR[] = {NULL, four_2, four_1};

static void multiply_panels(void *data, size_t index)
{
    const LinearWork *work = data;
    const LinearParams *params = work->params;
    const int64_t whole = panels(params);
    const Part *part = work->parts + index / work->groups;
    int64_t panel = (int64_t)(index % work->groups) * work->width;
    const int64_t stop = panel + work->width < whole ? panel + work->width : whole;
    Strip *const *strips = part->twice ? TWICE : params->row.block == 0 ? CHANNEL : params->bits == 8 ? EIGHT : FOUR;
    for (; strips[0] != NULL && panel + 4 <= stop; panel += 4)
        strips[0](work, part, panel);
    for (; panel + 2 <= stop; panel += 2)
        strips[1](work, part, panel);
    if (panel < stop)
        strips[2](work, part, panel);
}

static void quantize_rows(void *data, size_t index)
{
    const LinearWork *work = data;
    const RowParams *params = &work->params->row;
    const LinearCall *call = work->call;
    const int64_t first = (int64_t)index * QUANTIZED_ROWS, scales = row_scales(params), stride = row_bytes(params);
    for (int64_t r = first; r < first + QUANTIZED_ROWS && r < call->rows; r++) {
        const int64_t at = work->places[r];
        (work->places[r + 1] - at == 2 ? quantize_row_twice : quantize_row)(
            params, call->x + r * params->inputs, call->norm_weight, work->scratch + (int64_t)index * stride,
            work->activations + at * stride, work->scales + at * scales, work->sums + at * scales);
    }
}

/* Whether a sequence's tokens are quantized twice: it has one, and rows have one scale. */
static bool is_twice(const LinearParams *params, const LinearCall *call, int64_t sequence)
{
    if (params->row.block != 0)
        return false;
    return call->row_offsets == NULL ? call->single
                                     : call->row_offsets[sequence + 1] - call->row_offsets[sequence] == 1;
}

/* Lays out the quantized rows, and splits them into parts of neighbors that are quantized alike. Returns their number. */
static size_t lay_out_rows(const LinearParams *params, const LinearCall *call, int64_t *places, Part *parts)
{
    const int64_t sequences = call->row_offsets == NULL ? 1 : call->sequences;
    int64_t at = 0, count = 0;
    for (int64_t i = 0; i < sequences; i++) {
        const bool twice = is_twice(params, call, i);
        const int64_t end = call->row_offsets == NULL ? call->rows : call->row_offsets[i + 1];
        for (int64_t row = call->row_offsets == NULL ? 0 : call->row_offsets[i]; row < end; row++) {
            Part *last = parts + count - 1;
            if (count == 0 || last->twice != twice || last->end - last->from >= MULTIPLIED_ROWS) {
                parts[count++] = (Part){at, at, row, twice};
                last = parts + count - 1;
            }
            places[row] = at;
            at += twice ? 2 : 1;
            last->end = at;
        }
    }
    places[call->rows] = at;
    return (size_t)count;
}

static const char *linear_run(const LinearParams *params, const LinearCall *call, const Parallel *parallel)
{
    const int64_t stride = row_bytes(&params->row), scales = row_scales(&params->row);
    const int64_t most = params->row.block == 0 && (call->single || call->row_offsets != NULL) ? 2 * call->rows
                                                                                              : call->rows;
    const int64_t kinds = call->row_offsets == NULL ? 1 : call->sequences;
    const size_t tasks = (size_t)((call->rows + QUANTIZED_ROWS - 1) / QUANTIZED_ROWS);
    const size_t part_bytes = (size_t)(kinds + most / MULTIPLIED_ROWS + 1) * sizeof(Part);
    const size_t place_bytes = (size_t)(call->rows + 1) * sizeof(int64_t), activation_bytes = (size_t)(most * stride);
    const size_t scratch_bytes = tasks * (size_t)stride * sizeof(float), scale_bytes = (size_t)(most * scales) * 4;
    if (call->rows == 0)
        return NULL;
    uint8_t *memory
        = thread_scratch(OF_RUN, scratch_bytes + activation_bytes + part_bytes + place_bytes + 2 * scale_bytes);
    if (memory == NULL)
        return "satchel:Linear: out of memory";
    LinearWork work = {.params = params, .call = call, .scratch = (float *)memory};
    work.activations = (int8_t *)(memory + scratch_bytes);
    work.parts = (Part *)(memory + scratch_bytes + activation_bytes);
    work.places = (int64_t *)((uint8_t *)work.parts + part_bytes);
    work.scales = (float *)((uint8_t *)work.places + place_bytes);
    work.sums = (int32_t *)((uint8_t *)work.scales + scale_bytes);
    const size_t parts = lay_out_rows(params, call, work.places, work.parts);
    work.width = params->row.block == 0 && call->rows > 1 ? CHANNEL_PANELS : BLOCK_PANELS;
    work.groups = (size_t)((panels(params) + work.width - 1) / work.width);
    parallel_for(parallel, tasks, quantize_rows, &work);
    parallel_for(parallel, work.groups * parts, multiply_panels, &work);
    return NULL;
}
