/* Linux is asked for the matrix units when the library is loaded, as their registers make a thread's state larger. */

#include "matrix_units.h"

#if UNITS
#include <sys/syscall.h>
#include <unistd.h>

int32_t matrix_units;
enum { REQUEST = 0x1023, TILES = 18 }; /* ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA */

__attribute__((constructor)) static void ask(void) { matrix_units = !syscall(SYS_arch_prctl, REQUEST, TILES); }
#endif
