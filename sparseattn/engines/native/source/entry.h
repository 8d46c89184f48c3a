// What every entry shares. An entry takes one block of 64-bit numbers (pointers, strides and sizes as
// integers, then float64), whose order the launchers share; it returns 0, or 1 where memory ran out.
// Entries stand in several files, so that they compile side by side.
#pragma once

#include <cstdint>
#include <new>

namespace sparseattn {

template <class F>
static inline int64_t guarded(F&& f) {
    try {
        f();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace sparseattn
