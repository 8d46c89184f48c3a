#include "softmax_forward.h"

#include "entry.h"

using namespace sparseattn;

extern "C" int64_t sparseattn_softmax_forward(const Call* call) {
    return guarded([&] {
        if (!call->half) return softmax_forward<float, InFloats>(*call);
#if defined(SPARSEATTN_PAIRED)
        softmax_forward<bf16, InPairs>(*call);
#else
        softmax_forward<bf16, InFloats>(*call);
#endif
    });
}
