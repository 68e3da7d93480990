/* What the processor has, and the operating system lets programs use. */
#ifndef SATCHEL_PROCESSOR_H
#define SATCHEL_PROCESSOR_H

#include <stdbool.h>

#if defined(__x86_64__)
#if defined(__clang__) || __GNUC__ >= 11
#define SATCHEL_AVX_VNNI /* older compilers do not know it */
#ifdef __linux__
#define SATCHEL_AMX /* others do not let programs use it, or want to be asked in another way */
#endif
#endif
bool has_avx2(void);        /* with FMA */
bool has_avx_vnni(void);    /* and AVX2 */
bool has_avx512_vnni(void); /* and F, BW, DQ and VL */
bool has_amx(void);         /* and AVX-512 VNNI; asks the system for permission to use tiles */
#elif defined(__aarch64__)
#if defined(__clang__) || __GNUC__ >= 10
#define SATCHEL_I8MM /* older compilers do not know it */
#endif
bool has_dot_products(void);
bool has_i8mm(void); /* and dot products */
#endif

#endif
