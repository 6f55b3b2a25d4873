/* Matrix units, which multiply 16 rows of 16 units each by as many rows of weights: registers 0 to 3 have sums here, and the
   others what is multiplied. A system has to let a process use them. */

#include "numbers.h"

enum { DUO = 2 * LANES }; /* numbers in a row of a register */

#if PAIRED && defined(__AMX_BF16__) && defined(__linux__)
#define UNITS 1
extern int32_t matrix_units; /* whether they can be used */

/* What the compiler knows of memory is what the units read and write; it does not see that they do. */
#define SETTLED __asm__ volatile("" ::: "memory")

INLINE void begin_units(void)
{
    if (!matrix_units) return;
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    EACH(i, 8) shape.bytes[i] = 4 * LANES, shape.rows[i] = LANES;
    _tile_loadconfig(&shape);
}
INLINE void end_units(void)
{
    if (matrix_units) _tile_release();
}
#else
#define UNITS 0
enum { matrix_units = 0 };
INLINE void begin_units(void) {}
INLINE void end_units(void) {}
#endif
