/* How fast this processor multiplies, for satchel's planner. */
#ifndef SATCHEL_RATE_H
#define SATCHEL_RATE_H

/* Multiplications and additions a second of one thread that multiplies the rows of a prompt by int8 weights with the chosen
 * instruction set: the fastest of some rounds. 0: out of memory. */
double products_per_second(void);

#endif
