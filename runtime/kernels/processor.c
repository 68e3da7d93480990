#include "processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct {
    unsigned a, b, c, d;
} Leaf;

static Leaf leaf(unsigned number, unsigned part)
{
    Leaf found = {0};
    if (__get_cpuid_count(number, part, &found.a, &found.b, &found.c, &found.d))
        return found;
    return (Leaf){0};
}

static bool bit(unsigned word, int place) { return word >> place & 1; }

/* Whether the system saves these registers: a mask of extended control register 0. */
static bool saves(unsigned mask)
{
    unsigned low, high;
    if (!bit(leaf(1, 0).c, 27)) /* OSXSAVE */
        return false;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & mask) == mask;
}

enum { SAVES_YMM = 0x6, SAVES_ZMM = 0xe6, SAVES_TILES = 0x60000 };

/* With FMA and conversions of half precision, which processors with AVX2 have. */
bool has_avx2(void)
{
    const Leaf one = leaf(1, 0);
    return saves(SAVES_YMM) && bit(one.c, 12) && bit(one.c, 29) && bit(leaf(7, 0).b, 5);
}

bool has_avx_vnni(void) { return has_avx2() && bit(leaf(7, 1).a, 4); }

bool has_avx512_vnni(void)
{
    const Leaf seven = leaf(7, 0);
    return has_avx2() && saves(SAVES_ZMM) && bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31)
        && bit(seven.c, 11);
}

#ifdef SATCHEL_AMX
bool has_amx(void)
{
    enum { REQUEST = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    const Leaf seven = leaf(7, 0);
    return has_avx512_vnni() && saves(SAVES_TILES) && bit(seven.d, 22) && bit(seven.d, 24) && bit(seven.d, 25)
        && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0; /* of the process: asked again, it is granted again */
}
#endif

#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>

enum { DOT_PRODUCTS = 1 << 20, I8MM = 1 << 13 }; /* bits of AT_HWCAP and AT_HWCAP2 */

bool has_dot_products(void) { return getauxval(AT_HWCAP) & DOT_PRODUCTS; }
bool has_i8mm(void) { return has_dot_products() && getauxval(AT_HWCAP2) & I8MM; }
#elif defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>

static bool has(const char *feature)
{
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, NULL, 0) == 0 && value == 1;
}

bool has_dot_products(void) { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm(void) { return has_dot_products() && has("hw.optional.arm.FEAT_I8MM"); }
#elif defined(_WIN32)
#include <windows.h>

enum { DOT_PRODUCTS = 43, I8MM = 66 }; /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE, PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE */

bool has_dot_products(void) { return IsProcessorFeaturePresent(DOT_PRODUCTS); }
bool has_i8mm(void) { return has_dot_products() && IsProcessorFeaturePresent(I8MM); } /* older Windows: false */
#endif
#endif
