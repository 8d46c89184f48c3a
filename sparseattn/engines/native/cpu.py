"""Which CPU this is, and what the compiler is told of it."""

from __future__ import annotations

import os
import platform
import struct
import sys

from . import BuildError

_X86 = ("x86_64", "amd64")
_ARM = ("aarch64", "arm64")
# What a compiler may use under these names, where it is more than every CPU of the kind has: as
# x86-64-v4 and x86-64-v3 are defined, in the words of /proc/cpuinfo.
_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
# Name -> the machines that have it, the compiler's flag, and what the CPU must have.
_ISA: dict[str, tuple[tuple[str, ...], str, frozenset[str]]] = {
    "avx512": (_X86, "-march=x86-64-v4", _V4),
    "avx2": (_X86, "-march=x86-64-v3", _V3),
    "neon": (_ARM, "-march=armv8-a", frozenset()),
    "generic": (_X86, "-march=x86-64", frozenset()),
}
# The facts of /proc/cpuinfo that decide what `native` means; others change from moment to moment.
_FACTS = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
)


def _facts() -> dict[str, str]:
    """What /proc/cpuinfo says of the first core; empty where there is none to read."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:  # no more than the first core: each line costs time to make
                name, colon, value = line.partition(":")
                if not colon and found:
                    break
                if name.strip() in _FACTS:
                    found[name.strip()] = value.strip()
    except OSError:
        pass
    return found


def describe() -> str:
    """What tells this CPU from another for which other code would be made."""
    said = (f"{name}: {value}" for name, value in _facts().items())
    return "\n".join([platform.machine(), platform.processor(), *said])


def asked() -> str:
    """The instruction set that is built for: `SPARSEATTN_NATIVE_ISA`, or `native`."""
    return os.environ.get("SPARSEATTN_NATIVE_ISA") or "native"


def flags() -> tuple[str, ...]:
    """What tells the compiler which instructions it may use.

    Raises:
        BuildError: no kernels for this kind of machine; an instruction set of an unknown name, or
            one that this CPU cannot run.
    """
    machine = platform.machine().lower()
    if os.name != "posix":
        raise BuildError(f"its kernels are not built on {platform.system()}")
    if machine not in _X86 + _ARM or struct.calcsize("P") != 8 or sys.byteorder != "little":
        raise BuildError(f"its kernels are for x86-64 and 64-bit Arm CPUs, and this is {machine}")
    name = asked()
    if name == "native":
        return ("-march=native",) if machine in _X86 else ("-mcpu=native",)
    if name not in _ISA:
        known = ", ".join(["native", *_ISA])
        raise BuildError(f"SPARSEATTN_NATIVE_ISA={name!r:.40}: expected one of {known}")
    machines, flag, needed = _ISA[name]
    if machine not in machines:
        raise BuildError(f"SPARSEATTN_NATIVE_ISA={name} is not of {machine} CPUs")
    lacking = sorted(needed - set(_facts().get("flags", "").split()))
    if lacking:
        raise BuildError(
            f"SPARSEATTN_NATIVE_ISA={name} cannot run here: the CPU lacks {', '.join(lacking)}"
        )
    return (flag,)
