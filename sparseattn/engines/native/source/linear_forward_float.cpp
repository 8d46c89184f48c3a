#include "entry.h"
#include "linear_forward.h"

using namespace sparseattn;

extern "C" int64_t sparseattn_linear_forward_float(const LinearCall* call) {
    return guarded([&] { linear_forward<float>(*call); });
}
