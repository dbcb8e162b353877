"""The Triton kernel of fused.py: a product with E_u reduced where it is made."""

import triton
import triton.language as tl

__all__ = ["HALF_DEPTH", "SINGLE_DEPTH", "reduce_rows", "tuned_half", "tuned_single"]


@triton.jit(do_not_specialize=["rows", "columns", "positions", "span"])
def reduce_rows(
    states,  # [rows, width]
    weight,  # [columns, width]: a tile of E_u
    bias,  # [columns]
    probs,  # [positions, columns], float32: pi_theta over the tile
    tokens,  # [positions], int64: the produced tokens, as columns of the tile
    tops,  # [positions], int64: pi_theta's most probable tokens, likewise
    out,  # [splits, 3 or 6, rows], float32
    rows,
    columns,
    positions,
    span,
    width,
    state_stride,
    weight_stride,
    probs_stride,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    EVEN: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Reduce the logits of BLOCK_ROWS rows over columns [split * span, (split + 1) * span).

    Writes the maximum m, sum exp(l - m) and sum exp(l - m)(l - m); where ASKED also
    sum probs * l and the logits of `tokens` and `tops` (0 where these columns lack them). Row r
    belongs to position r % positions. Ragged edges read row or column 0 again and are masked
    where they would count.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    read_row = tl.where(is_row, row, 0)
    depth = tl.arange(0, BLOCK_DEPTH)
    state_at = states + read_row.to(tl.int64)[:, None] * state_stride + depth[None, :]

    maximum = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
    if ASKED:
        position = read_row % positions
        token = tl.load(tokens + position)
        theirs = tl.load(tops + position)
        probs_at = position[:, None] * probs_stride
        dot = tl.zeros((BLOCK_ROWS,), tl.float32)
        at_token = tl.zeros((BLOCK_ROWS,), tl.float32)
        at_top = tl.zeros((BLOCK_ROWS,), tl.float32)

    split = tl.program_id(1)
    start = split * span
    stop = tl.minimum(start + span, columns)
    for left in range(start, stop, BLOCK_COLUMNS):
        column = left + tl.arange(0, BLOCK_COLUMNS)
        is_column = column < stop
        read_column = tl.where(is_column, column, 0)
        weight_at = weight + read_column.to(tl.int64)[None, :] * weight_stride + depth[:, None]
        logits = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for below in range(0, width, BLOCK_DEPTH):
            if EVEN:
                state = tl.load(state_at + below)
                unembed = tl.load(weight_at + below)
            else:
                there = depth < width - below
                state = tl.load(state_at + below, mask=there[None, :], other=0.0)
                unembed = tl.load(weight_at + below, mask=there[:, None], other=0.0)
            if WIDEN:
                state = state.to(tl.float32)
                unembed = unembed.to(tl.float32)
            logits = tl.dot(state, unembed, logits, input_precision="ieee")

        if HAS_BIAS:
            logits += tl.load(bias + read_column).to(tl.float32)[None, :]
        if HAS_SCALE:
            logits = logits * scale
        if HAS_SOFTCAP:
            # tanh |x| = (1 - exp(-2|x|)) / (1 + exp(-2|x|)): it never overflows.
            decayed = tl.exp(-2.0 * tl.abs(logits) / softcap)
            capped = softcap * ((1.0 - decayed) / (1.0 + decayed))
            logits = tl.where(logits < 0, -capped, capped)

        if ASKED:
            prob = tl.load(probs + (probs_at + column[None, :]), mask=is_column[None, :], other=0.0)
            dot += tl.sum(prob * logits, 1)
            # Few blocks hold a token that is asked for.
            right = tl.minimum(left + BLOCK_COLUMNS, stop)
            holds = ((token >= left) & (token < right)) | ((theirs >= left) & (theirs < right))
            if tl.max(holds.to(tl.int32), 0) > 0:
                own = (column[None, :] == token[:, None]) & is_column[None, :]
                at_token += tl.sum(tl.where(own, logits, 0.0), 1)
                own = (column[None, :] == theirs[:, None]) & is_column[None, :]
                at_top += tl.sum(tl.where(own, logits, 0.0), 1)

        # A masked column counts exp(FLOOR), which is nothing beside a total of 1 or more.
        logits = tl.where(is_column[None, :], logits, -float("inf"))
        higher = tl.maximum(maximum, tl.max(logits, 1))
        # NaN goes through, so that logits that overflow are not taken for small ones.
        shifted = tl.maximum(logits - higher[:, None], FLOOR, propagate_nan=tl.PropagateNan.ALL)
        exponentials = tl.exp(shifted)
        drop = tl.maximum(maximum - higher, FLOOR, propagate_nan=tl.PropagateNan.ALL)
        decay = tl.exp(drop)
        weighted = decay * (weighted + total * drop) + tl.sum(exponentials * shifted, 1)
        total = decay * total + tl.sum(exponentials, 1)
        maximum = higher

    if ASKED:
        out_at = out + split.to(tl.int64) * 6 * rows + row
        tl.store(out_at + 3 * rows, dot, mask=is_row)
        tl.store(out_at + 4 * rows, at_token, mask=is_row)
        tl.store(out_at + 5 * rows, at_top, mask=is_row)
    else:
        out_at = out + split.to(tl.int64) * 3 * rows + row
    tl.store(out_at, maximum, mask=is_row)
    tl.store(out_at + rows, total, mask=is_row)
    tl.store(out_at + 2 * rows, weighted, mask=is_row)


def _config(columns: int, depth: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_COLUMNS": columns, "BLOCK_DEPTH": depth}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


#: bf16 and fp16: one large block a processor, or two that hide each other's reductions.
HALF_CONFIGS = [
    _config(256, 64, 8, 3),
    _config(256, 64, 8, 4),
    _config(128, 64, 8, 4),
    _config(128, 64, 8, 3),
    _config(128, 64, 4, 3),
    _config(128, 128, 8, 3),
]
#: float32 without tensor cores.
SINGLE_CONFIGS = [
    _config(128, 16, 8, 3),
    _config(128, 32, 8, 3),
    _config(64, 32, 8, 3),
]
#: The deepest blocks: a d_model that these divide is read without masks.
HALF_DEPTH, SINGLE_DEPTH = 128, 32
_KEY = ["width", "BLOCK_ROWS", "ASKED", "EVEN"]
tuned_half = triton.autotune(HALF_CONFIGS, _KEY)(reduce_rows)
tuned_single = triton.autotune(SINGLE_CONFIGS, _KEY)(reduce_rows)
