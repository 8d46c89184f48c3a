#include "softmax_rows.h"

#include "entry.h"

using namespace sparseattn;

extern "C" int64_t sparseattn_softmax_rows(const Call* call) {
    return guarded([&] {
        if (call->half) return softmax_rows<bf16, Single>(*call);
        call->exact ? softmax_rows<float, Double>(*call) : softmax_rows<float, Single>(*call);
    });
}
