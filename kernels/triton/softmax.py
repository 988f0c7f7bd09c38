# mypy: ignore-errors
"""The online softmax over tiles, and the merge of its parts by their log-sum-exps.

Logits are in units of ln 2, so that weights are powers of two.
"""

import triton
import triton.language as tl

from kvcompile.kernels.triton.wrapper import turn


@triton.jit
def capped(s, SOFTCAP: tl.constexpr):
    """Logits, softcapped where that is asked for, in units of ln 2."""
    if SOFTCAP > 0:
        s = SOFTCAP * 1.4426950408889634 * (2 * tl.sigmoid(s * (2 / SOFTCAP)) - 1)
    return s


@triton.jit
def weigh(s, m, l):
    """Weights of the logits s [M, N], the new maximum, sum, and what earlier sums count."""
    most = tl.maximum(m, tl.max(s, 1))
    base = tl.where(most == -float("inf"), 0.0, most)         # nothing seen yet
    p = tl.exp2(s - base[:, None])
    kept = tl.exp2(m - base)
    return p, most, l * kept + tl.sum(p, 1), kept


@triton.jit
def merge(part, stats, numbers, sinks, out, lse, tokens, G: tl.constexpr, H: tl.constexpr,
          DV: tl.constexpr, DVP: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr,
          SPLITS: tl.constexpr, TURN: tl.constexpr, SINKS: tl.constexpr, ABREAST: tl.constexpr):
    """One query head of one token: part [.., SPLITS, WIDTH] and stats [.., SPLITS, 2] -> out, lse.

    Queries lie as [rows, heads, tokens, G]. The first OUT of a part's DV numbers are the result;
    with TURN its second DV are turned.
    """
    query = tl.program_id(0).to(tl.int64)
    g, token = query % G, query // G % tokens
    place = query // G // tokens
    row, head = place // H, place % H * G + g
    s = tl.arange(0, ABREAST)
    c = tl.arange(0, DVP)
    valid = tl.load(numbers + row * tokens + token) >= 0
    most = -float("inf")
    if SINKS:
        most = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
    sink = most
    for first in range(0, SPLITS, ABREAST):
        m = tl.load(stats + (query * SPLITS + first + s) * 2, mask=first + s < SPLITS,
                    other=-float("inf"))
        most = tl.maximum(most, tl.max(m, 0))
    base = tl.where(most == -float("inf"), 0.0, most)
    total = tl.exp2(sink - base)
    o = tl.zeros((DVP,), tl.float32)
    turned = tl.zeros((DVP,), tl.float32)
    for first in range(0, SPLITS, ABREAST):
        at = query * SPLITS + first + s
        mask = first + s < SPLITS
        m = tl.load(stats + at * 2, mask=mask, other=-float("inf"))
        share = tl.exp2(m - base)
        total += tl.sum(share * tl.load(stats + at * 2 + 1, mask=mask, other=0.0), 0)
        where = part + at[:, None] * WIDTH + c[None, :]
        both = mask[:, None] & (c < DV)[None, :] & (m > -float("inf"))[:, None]
        o += tl.sum(share[:, None] * tl.load(where, mask=both, other=0.0), 0)
        if TURN > 0:
            turned += tl.sum(share[:, None] * tl.load(where + DV, mask=both, other=0.0), 0)
    if TURN > 0:
        o += tl.reshape(turn(tl.reshape(turned, (1, DVP)), 1, DVP, TURN), (DVP,))
    seen = valid & (total > 0)
    o = tl.where(seen, o / tl.where(seen, total, 1.0), 0.0)
    at = ((row * tokens + token) * (H * G) + head) * OUT     # the heads of a token lie together
    tl.store(out + at + c, o.to(out.dtype.element_ty), mask=c < OUT)
    to = (row * (H * G) + head) * tokens + token
    answer = (most + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453
    tl.store(lse + to, tl.where(seen, answer, -float("inf")))
