#include "baseline.h"
#include "norms.inc"
