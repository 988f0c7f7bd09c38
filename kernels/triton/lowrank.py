# mypy: ignore-errors
"""What another format loses, as two thin matrices (kernels/lowrank.py), read and written."""

import triton
import triton.language as tl


@triton.jit
def lowrank(x, a, b, page, at, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
            STEP: tl.constexpr, RANK: tl.constexpr):
    """x + a b: in a page, a [128 / STEP][RANK][STEP] and b [128 / STEP][RANK][D]."""
    ROWS: tl.constexpr = N // STEP if N > STEP else 1
    t = at + tl.arange(0, N)
    row = at // STEP + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, DP)[None, :]
    x = tl.reshape(x, (ROWS, N // ROWS, DP))
    for r in tl.static_range(RANK):
        left = tl.load(a + page * (128 * RANK) + (t // STEP * RANK + r) * STEP + t % STEP)
        right = tl.load(b + page * (128 // STEP * RANK * D) + (row * RANK + r) * D + c,
                        mask=c < D, other=0.0)
        left = tl.reshape(left.to(tl.float32), (ROWS, N // ROWS, 1))
        x += left * right.to(tl.float32)[:, None, :]
    return tl.reshape(x, (N, DP))


@triton.jit
def column(x, i, r):
    return tl.sum(tl.where(r == i, x, 0.0), 1)


@triton.jit
def orthonormal(z, DP: tl.constexpr, RP: tl.constexpr, RANK: tl.constexpr):
    """The first RANK columns of z [DP, RP] as an orthonormal basis, the others 0; Gram-Schmidt."""
    r = tl.arange(0, RP)[None, :]
    q = tl.zeros((DP, RP), tl.float32)
    for i in tl.static_range(RANK):
        x = column(z, i, r)
        before = tl.sum(x * x, 0)
        for _ in tl.static_range(2):  # twice is enough (Kahan)
            x = x - tl.sum(q * tl.sum(q * x[:, None], 0)[None, :], 1)
        size = tl.sum(x * x, 0)
        fine = size > before * 1e-12  # else it lies among the others
        x = tl.where(fine, x / tl.sqrt_rn(tl.where(fine, size, 1.0)), 0.0)
        q = tl.where(r == i, x[:, None], q)
    return q


@triton.jit
def fit_lowrank(a, b, page, at, keep, error, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                RANK: tl.constexpr, STEPS: tl.constexpr, A: tl.constexpr, M: tl.constexpr):
    """Store error [N, DP] as a b, of rank RANK, by subspace iteration; N tokens are a step."""
    RP: tl.constexpr = 16
    c = tl.arange(0, DP)[:, None]
    r = tl.arange(0, RP)[None, :]
    q = ((c + 1) * (2 * r + 1) * A % M - M // 2).to(tl.float32) / M
    q = tl.where((c < D) & (r < RANK), q, 0.0)
    for _ in range(STEPS):
        z = tl.zeros((DP, RP), tl.float32)
        for i in tl.static_range(RANK):  # thin products: no tile of tensor cores
            y = tl.sum(error * column(q, i, r)[None, :], 1)
            z = tl.where(r == i, tl.sum(error * y[:, None], 0)[:, None], z)
        q = orthonormal(z, DP, RP, RANK)
    whole = tl.max(keep.to(tl.int32), 0) > 0
    step = page * (128 // N) + at // N
    for i in tl.static_range(RANK):
        y = tl.sum(error * column(q, i, r)[None, :], 1)
        tl.store(a + (step * RANK + i) * N + tl.arange(0, N), y.to(tl.float16), mask=whole)
    tl.store(b + (step * RANK + r) * D + c, q.to(tl.float16),
             mask=whole & (r < RANK) & (c < D))
