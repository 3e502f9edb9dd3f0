#include "baseline.h"
#include "kernels.inc"
