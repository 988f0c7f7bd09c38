# mypy: ignore-errors
"""Tokens that move from one place to another, in a plane of pages (kvcompile/format.StepPlane)."""

import triton
import triton.language as tl


@triton.jit
def token_at(page, t, E: tl.constexpr, LANES: tl.constexpr, REST: tl.constexpr):
    return page * (128 * E) + t // LANES * (LANES * E) + t % LANES * REST


@triton.jit
def move_tokens(plane, to, at, origin, source, keep, E: tl.constexpr, EP: tl.constexpr,
                LANES: tl.constexpr, REST: tl.constexpr):
    """Tokens `source` of pages `origin` to the places `at` of pages `to`: E numbers of each.

    In a page LANES tokens lie interleaved in front of their last REST numbers.
    """
    e = tl.arange(0, EP)[None, :]
    inside = e // REST * (LANES * REST) + e % REST
    mask = keep[:, None] & (e < E)
    x = tl.load(plane + token_at(origin, source, E, LANES, REST)[:, None] + inside, mask=mask)
    tl.store(plane + token_at(to, at, E, LANES, REST)[:, None] + inside, x, mask=mask)
