#include "rate.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "instruction_set.h"
#include "serial.h"

enum { ROWS = 512, WIDTH = 2048, ROUNDS = 8 };

static double seconds(void)
{
    struct timespec time;
    timespec_get(&time, TIME_UTC);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

double products_per_second(void)
{
    static const LinearParams params = {.row = {.inputs = WIDTH}, .outputs = WIDTH, .bits = 8};
    const size_t weights = (size_t)(panels(&params) * panel_bytes(&params)), numbers = ROWS * WIDTH;
    float *x = malloc((2 * numbers + WIDTH) * sizeof *x + weights), *y = x + numbers, *scales = y + numbers;
    double best = 0;
    if (x == NULL)
        return 0;
    for (size_t i = 0; i < numbers; i++)
        x[i] = (float)(i % 251) - 125;
    for (size_t i = 0; i < WIDTH; i++)
        scales[i] = 1;
    memset(scales + WIDTH, 77, weights);
    const LinearCall call = {.rows = ROWS, .x = x, .weights = (const uint8_t *)(scales + WIDTH), .scales = scales, .y = y};
    for (int i = 0; i < ROUNDS; i++) {
        const double start = seconds();
        if (instructions->linear(&params, &call, &SERIAL) != NULL)
            break;
        const double rate = 2. * ROWS * WIDTH * WIDTH / (seconds() - start);
        best = rate > best ? rate : best;
    }
    free(x);
    return best;
}
