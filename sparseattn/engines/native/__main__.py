"""`python -m sparseattn.engines.native`: builds the C++ kernels ahead of their first use."""

from __future__ import annotations

import argparse
import os
import sys
import time

from . import BuildError, build, cache, cpu, library


def main(words: list[str] | None = None) -> int:
    """Build, load, and say where; 1 with the reason where that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m sparseattn.engines.native",
        description="Build the C++ kernels of the CPU ahead of their first use.",
    )
    parser.add_argument("--sanitize", action="store_true", help="with sanitizers, as tests run it")
    if parser.parse_args(words).sanitize:
        os.environ["SPARSEATTN_NATIVE_SANITIZE"] = "1"
    try:
        recipe = build.recipe()
        was_there = cache.intact(cache.folder() / recipe.name)
        began = time.perf_counter()
        # A sanitized library loads only beside its sanitizer, so here it is built and no more.
        path = build.built(recipe) if build.sanitizing() else library.open_library().path
        took = time.perf_counter() - began
    except BuildError as error:
        print(f"the C++ kernels cannot be built: {error}", file=sys.stderr)
        return 1
    print(f"library    {path}")
    print(f"compiler   {' '.join(recipe.compiler)} ({recipe.version})")
    print(f"for        {cpu.asked()}: {' '.join(recipe.flags)}")
    print("build      it was there" if was_there else f"build      {took:.1f} s")
    if os.environ.get("SPARSEATTN_NATIVE") == "0":
        print("not used   SPARSEATTN_NATIVE=0 turns it off")
    return 0


if __name__ == "__main__":
    sys.exit(main())
