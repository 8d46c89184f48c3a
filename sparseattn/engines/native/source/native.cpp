// The C++ kernels of both engines: what Python calls. Every entry takes one block of 64-bit numbers
// (pointers, strides and sizes as integers, then float64), whose order the launchers share.
#include "linear_backward.h"
#include "softmax_backward.h"
#include "softmax_rows.h"

using namespace sparseattn;

namespace {

template <class F>
int64_t guarded(F&& f) {
    try {
        f();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

extern "C" {

int64_t sparseattn_native_abi() { return 1; }

// What was built: lanes of float32, and whether products of bfloat16 pairs are native.
int64_t sparseattn_native_lanes() { return LANES; }
int64_t sparseattn_native_pairs() {
#if defined(SPARSEATTN_PAIRED)
    return 1;
#else
    return 0;
#endif
}
int64_t sparseattn_softmax_size() { return int64_t(sizeof(Call)); }

int64_t sparseattn_softmax_forward(const Call* call) {
    return guarded([&] {
        if (!call->half) return softmax_forward<float, InFloats>(*call);
#if defined(SPARSEATTN_PAIRED)
        softmax_forward<bf16, InPairs>(*call);
#else
        softmax_forward<bf16, InFloats>(*call);
#endif
    });
}

int64_t sparseattn_softmax_rows(const Call* call) {
    return guarded([&] {
        if (call->half) return softmax_rows<bf16, Single>(*call);
        call->exact ? softmax_rows<float, Double>(*call) : softmax_rows<float, Single>(*call);
    });
}

int64_t sparseattn_softmax_backward(const Call* call) {
    return guarded([&] {
        if (!call->half) return softmax_backward<float, InFloats>(*call);
#if defined(SPARSEATTN_PAIRED)
        softmax_backward<bf16, InPairs>(*call);
#else
        softmax_backward<bf16, InFloats>(*call);
#endif
    });
}

int64_t sparseattn_linear_size() { return int64_t(sizeof(LinearCall)); }

int64_t sparseattn_linear_forward(const LinearCall* call) {
    return guarded([&] {
        call->wide ? linear_forward<double>(*call) : linear_forward<float>(*call);
    });
}

int64_t sparseattn_linear_backward(const LinearCall* call) {
    return guarded([&] {
        call->wide ? linear_backward<double>(*call) : linear_backward<float>(*call);
    });
}
}
