// What was built, and the sizes of the blocks that entries take.
#include "call.h"
#include "linear_call.h"

using namespace sparseattn;

extern "C" {

int64_t sparseattn_native_abi() { return 1; }

// Lanes of float32, and whether products are of bfloat16 pairs.
int64_t sparseattn_native_lanes() { return LANES; }
int64_t sparseattn_native_pairs() {
#if defined(SPARSEATTN_PAIRED)
    return 1;
#else
    return 0;
#endif
}

int64_t sparseattn_softmax_size() { return int64_t(sizeof(Call)); }
int64_t sparseattn_linear_size() { return int64_t(sizeof(LinearCall)); }
}
