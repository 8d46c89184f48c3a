"""The states of spans: the sum over the rows of each, then the sums over all before it.

    sum[f, e] = sum_r gamma ** |position - r| phi(x_r)[f] value_r[e],   sum[f] the same of ones

The first kernel makes the sums of spans apart, in any order; the second adds them up along the run.
Both serve keys with their values forwards, and queries with gradients backwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .features import features, number_of, put_rows, raw_rows


@triton.jit
def power_of(LOGS, head, distance, NUMBER: tl.constexpr, DECAY: tl.constexpr):
    """`gamma ** distance`, worked out in float64 and rounded once; 1 without a decay."""
    if DECAY:
        made = tl.exp2(tl.load(LOGS + head) * distance.to(tl.float64)).to(NUMBER)
    else:
        made = tl.full(distance.shape, 1.0, NUMBER)
    return made


@triton.jit(do_not_specialize=["mask_batch", "width", "value_width", "count", "slots"])
def sums(
    X,
    VALUE,
    LENGTH,
    MEAN,
    STATE,
    RUNS,
    SPANS,
    KEY_MASK,
    LOGS,
    ROWS_OF,
    SHIFT,
    x_batch,
    x_head,
    x_row,
    value_batch,
    value_head,
    value_row,
    length_batch,
    length_head,
    mask_batch,
    width,
    value_width,
    count,
    blocks,
    groups,
    slots,
    scale,
    scale_rest,
    turn,
    turn_rest,
    OF_QUERIES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DECAY: tl.constexpr,
    HOLES: tl.constexpr,
    EVEN: tl.constexpr,
    FUNCTION: tl.constexpr,
    PARTS: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    NUMBER: tl.constexpr,
    INPUT: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
):
    """Program (span x block of features x block of values, head of the state, batch row).

    Of keys: X is k, VALUE v. OF_QUERIES: X is q, VALUE the gradient of the output, of each query
    head in a group (with DECAY a state has one); rows are divided by LENGTH, their row sums, and
    MEAN, what the gradient of the division takes away, stands with its sign changed for the ones.
    """
    value_blocks = (value_width + E - 1) // E
    tile = tl.program_id(0) // (blocks * PARTS * value_blocks)
    rest = tl.program_id(0) % (blocks * PARTS * value_blocks)
    part = rest // (blocks * value_blocks)
    block = rest // value_blocks % blocks
    value_block = rest % value_blocks
    span = SPANS + tile * 8
    run = RUNS + tl.load(span) * 9
    start = tl.load(span + 1)
    stop = tl.load(span + 2)
    position_met = tl.load(span + 4)
    batch = tl.load(run) + tl.program_id(2)
    head = tl.program_id(1).to(tl.int64)
    scale = number_of(scale, scale_rest, NUMBER)
    turn = number_of(turn, turn_rest, NUMBER)
    offset = tl.load(run + 5) if OF_QUERIES else 0
    first = tl.load(run + 1) if OF_QUERIES else tl.load(run + 3)
    heads = groups if OF_QUERIES and not DECAY else 1

    e = value_block * E + tl.arange(0, E)
    state = tl.zeros([F, E], NUMBER)
    ones = tl.zeros([F], NUMBER)
    for member in range(0, heads):
        own = head * heads + member if OF_QUERIES else head // (groups if DECAY else 1)
        for at in range(start, stop, ROWS):
            row = at + tl.arange(0, ROWS)
            real = row < stop
            if HOLES and not OF_QUERIES:
                hole_at = KEY_MASK + batch * mask_batch + first
                real = real & (tl.load(hole_at + row, real, 0) != 0)
            place = first + row
            shift = tl.zeros([ROWS], NUMBER)
            if PROJECT:
                shift_at = batch * length_batch + own * length_head + place
                shift = tl.load(SHIFT + shift_at, real, 0.0)
            phi, _ = features(
                *(X, batch * x_batch + own * x_head + place * x_row, real, offset + row),
                *(block, part, width, count, scale, turn, ROWS_OF, shift),
                *(F, D, True, EVEN, FUNCTION, PARTS, PROJECT, PRECISION, NUMBER, INPUT),
            )
            value_at = batch * value_batch + own * value_head + place * value_row
            value = raw_rows(VALUE, value_at, real, e, value_width, EVEN)
            by = power_of(LOGS, head, tl.abs(position_met - offset - row), NUMBER, DECAY)
            if OF_QUERIES and NORMALIZE:
                length_at = batch * length_batch + own * length_head + place
                by /= tl.load(LENGTH + length_at, real, 1.0)
                one = -by * tl.load(MEAN + length_at, real, 0.0)
            else:
                one = by
            if DECAY or OF_QUERIES:
                value = value.to(NUMBER) * by[:, None]
            value = value.to(INPUT)
            state = tl.dot(phi, value, state, input_precision=PRECISION, out_dtype=NUMBER)
            if NORMALIZE:
                ones += tl.sum(phi.to(NUMBER) * one[None, :], 1)

    f = block * F + tl.arange(0, F)
    real = f < count
    f = part * count + f
    slot = tl.load(span + 3) + tl.program_id(2).to(tl.int64) * slots
    size = tl.cast(count, tl.int64) * PARTS * (value_width + 1)
    state_row = value_width
    if EVEN:  # what these are multiples of, said for wide stores
        size = size // 16 * 16
        state_row = value_width // 16 * 16
    at = STATE + (slot * tl.num_programs(1) + head) * size
    put_rows(at, f * state_row, real, e, value_width, state, EVEN)
    if value_block == 0:
        tl.store(at + count * PARTS * value_width + f, ones, real)


@triton.jit(do_not_specialize=["size", "slots"])
def scan(
    STATE,
    BEGIN,
    END,
    RUNS,
    LOGS,
    size,
    slots,
    span,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    BEGINS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Program (run x block of a state, head, batch row): what each span meets, in place of its sum.

    Sums are carried in float64, and rounded once for each span. BEGIN (if BEGINS) is the state
    before the first span, in reverse after the last; END takes the last one. Both are float64, with
    the strides of one slot.
    """
    blocks = (size + BLOCK - 1) // BLOCK
    run = RUNS + tl.program_id(0) // blocks * 9
    element = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    real = element < size
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    slot = tl.load(run + 6) + tl.program_id(2).to(tl.int64) * slots
    count = tl.load(run + 7)
    step = heads * tl.cast(size, tl.int64)
    at = STATE + slot * step + head * tl.cast(size, tl.int64) + element
    total = tl.zeros([BLOCK], tl.float64)
    own_at = tl.program_id(2) * step + head * tl.cast(size, tl.int64) + element
    if BEGINS:
        total = tl.load(BEGIN + own_at, real, 0.0)
    shrink = 1.0
    if DECAY:
        shrink = tl.exp2(tl.load(LOGS + head) * tl.cast(span, tl.float64))
    if REVERSE:
        for tail in range(count, count + tl.load(run + 8)):
            total += tl.load(at + tail * step, real, 0.0).to(tl.float64)
        tl.store(at + count * step, total.to(STATE.dtype.element_ty), real)
    # A few spans are loaded at once: each store waits for the sums of those before it alone.
    ahead = tl.arange(0, AHEAD)
    for i in range(0, count, AHEAD):
        span_at = count - 1 - i - ahead if REVERSE else i + ahead
        inside = ((span_at >= 0) & (span_at < count))[:, None] & real[None, :]
        here = at[None, :] + span_at[:, None] * step
        added = tl.load(here, inside, 0.0)
        met = tl.zeros([AHEAD, BLOCK], STATE.dtype.element_ty)
        for nth in tl.static_range(AHEAD):
            own = tl.sum(tl.where(ahead[:, None] == nth, added, 0.0), 0).to(tl.float64)
            met = tl.where(ahead[:, None] == nth, total.to(STATE.dtype.element_ty)[None, :], met)
            total = tl.where(i + nth < count, total * shrink + own, total)
        tl.store(here, met, inside)
    if not REVERSE:
        tl.store(at + count * step, total.to(STATE.dtype.element_ty), real)
    tl.store(END + own_at, total, real)
