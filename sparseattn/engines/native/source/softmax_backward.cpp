#include "softmax_backward.h"

#include "entry.h"

using namespace sparseattn;

extern "C" int64_t sparseattn_softmax_backward(const Call* call) {
    return guarded([&] {
        if (!call->half) return softmax_backward<float, InFloats>(*call);
#if defined(SPARSEATTN_PAIRED)
        softmax_backward<bf16, InPairs>(*call);
#else
        softmax_backward<bf16, InFloats>(*call);
#endif
    });
}
