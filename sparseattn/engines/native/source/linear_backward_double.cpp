#include "entry.h"
#include "linear_backward.h"

using namespace sparseattn;

extern "C" int64_t sparseattn_linear_backward_double(const LinearCall* call) {
    return guarded([&] { linear_backward<double>(*call); });
}
