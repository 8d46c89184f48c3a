"""`compare` and `bench`: every mechanism on every input and length, beside its controls."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .. import functional, registry
from ..base import MaskedSoftmax, Mechanism
from ..errors import InvalidInputError, SparseAttnError, UnknownMechanismError, did_you_mean
from ..layout import Grid, Layout
from .cell import Cell, Entry, Settings
from .inputs import Shape, Source, source
from .manifest import manifest
from .measure import isolated
from .metrics import MeanOfValues, mark_pareto
from .store import Journal, Row, jsonable, key

Progress = Callable[[int, int, str], None]

# Some 256 keys a query where a pattern has a budget, so that they may be compared.
DEFAULT_SPECS = (
    "windowed(window=256)",
    "windowed(window=252, sinks=4)",
    "dilated(window=256, dilation=2)",
    "chunked(chunk=256)",
    "longformer(window=256, global_tokens=4)",
    "bigbird",
    "topk_blocks(block=64, top=2)",
    "oracle_topk(keys=256)",
    "performer",
    "taylor",
    "linear",
)
BENCH_SPECS = ("windowed(window=256)", "bigbird", "topk_blocks(block=64, top=2)", "linear")
BENCH_LENGTHS = (512, 1024, 2048, 4096, 8192)
DTYPES = {str(d).removeprefix("torch."): d for d in functional_dtypes()} if False else {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
