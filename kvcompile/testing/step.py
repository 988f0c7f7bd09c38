"""One decode step of a layer whose cache holds random tokens, and what an oracle lets it give."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvcompile.checks.promise import Rebuilt
from kvcompile.checks.rounding import Arithmetic, rounding
from kvcompile.format import Format, term_of
from kvcompile.ir import APPEND, ATTEND
from kvcompile.laws import How, View
from kvcompile.method import Method
from kvcompile.planes import Group
from kvcompile.registry import module
from kvcompile.site import Site
from kvcompile.store import Store
from kvcompile.testing.stores import Shape, drawn_site
from kvcompile.testing.strategies import dims, formats_of

LENGTHS = (0, 80, 208)  # tokens of the rows, and SPARE more, before the steps: in those one row
SPARE = 46              # ends a step of 16, two a block of 128
STEPS = {"C++": 12, "Triton": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Step(NamedTuple):
    """What a kernel is made for."""

    store: Store
    shape: Shape
    dtype: torch.dtype
    made: Any = None        # how keys are made of what is stored (kernels/rebuild.py: Made)

    @property
    def site(self) -> Site:
        q_heads, heads, dim = self.shape
        return Site(0, q_heads, heads, (dim, dim), self.dtype, 0, self.store, made=self.made)

    @property
    def dim(self) -> int:
        """Channels of a query."""
        return self.made.dim if self.made else self.shape.dim

    def rebuilt(self, row: int) -> Rebuilt:
        """How an oracle makes keys."""
        basis, offset, cos, sin = map(operands(self).get, ("basis", "offset", "cos", "sin"))
        style = self.made.style if self.made else ""
        return Rebuilt(basis, offset, cos, sin, style).row(row)

    def group(self) -> Group:
        """Planes of two layers, of which the second is used, with random tokens in its rows."""
        group, most = Group([self.site, self.site], len(LENGTHS), torch.device("cpu")), max(LENGTHS)
        group.reserve([most + SPARE + max(STEPS.values())] * len(LENGTHS))
        first = torch.arange(most)[None] < torch.tensor(LENGTHS)[:, None]
        for tokens, valid, seed in ((most, first, 0), (SPARE, torch.ones(len(LENGTHS), SPARE), 1)):
            _, k, v = self.tokens(tokens, seed)
            APPEND(group.planes, k, v, _numbers(valid), valid.bool(), store=str(self.store),
                   slots=[1])
        return group

    def tokens(self, tokens: int, seed: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """q, and k and v of every layer of the slot, with an outlier channel and a token of 0."""
        (q_heads, heads, dim), g = self.shape, torch.Generator().manual_seed(seed)
        rows, members = len(LENGTHS), self.store.members
        k, v = torch.randn(2, members, rows, heads, tokens, dim, generator=g)
        k[..., 5] *= 8
        k[..., tokens // 2, :] *= tokens == 1
        q = torch.randn(rows, q_heads, tokens, self.dim, generator=g).to(self.dtype)
        keys = list(k.to(self.dtype))
        return q, keys, keys if self.store.v_in_k else list(v.to(self.dtype))

    def attend(self, q: Tensor, k: list[Tensor], v: list[Tensor], planes: list[Any],
               valid: Tensor) -> tuple[Any, dict[str, Any]]:
        """The arguments of kvc.attend for the last layer of the slot."""
        options = dict(scale=self.dim**-0.5, store=str(self.store), slot=1,
                       member=self.store.members - 1)
        if self.made:
            options["style"] = self.made.style
        return (q, k[-1], v[-1], planes, valid.long(), valid, None), options

    def read(self, group: Group, row: int) -> tuple[Tensor, Tensor]:
        """K and V [H, N, D] in fp32 as they are stored, and the plain body reads a row's for the
        last layer."""
        pages, dim = module("kernels", "pages"), self.shape.dim
        named = pages.named(group.specs, group.planes, [1])
        n, found = int(group.planes[0][1, row, 0]), []
        for side in self.store.sides:
            tiers = pages.tiers(self.store, side, named, dim, torch.float32)
            every = pages.stored(self.store, side, tiers, row, slice(0, self.shape.heads), n)
            found.append(every[..., (self.store.members - 1) * dim:])
        return found[0], found[-1]


@cache
def operands(step: Step) -> dict[str, Tensor]:
    """What keys are made with, by the names of kvc.attend's arguments."""
    found, g, made = dict[str, Tensor](), torch.Generator().manual_seed(0), step.made
    if made and made.basis:
        size = step.shape.heads * made.keys, made.dim, step.shape.dim
        found["basis"] = (torch.randn(size, generator=g) / size[2]**0.5).to(made.parts)
    if made and made.offset:
        found["offset"] = torch.randn(found["basis"].shape[:2], generator=g).to(made.parts)
    if made and made.rotary:
        tokens = max(LENGTHS) + SPARE + max(STEPS.values())
        angle = 6 * torch.rand(len(LENGTHS), 1, tokens, made.rotary // 2, generator=g)
        angle = (torch.cat([angle, angle], -1) if made.style == "half"
                 else angle.repeat_interleave(2, -1))
        found |= {"cos": angle.cos().to(made.angles), "sin": angle.sin().to(made.angles)}
    return found


def _numbers(valid: Tensor) -> Tensor:
    return (valid.long().cumsum(1) - 1).clamp_min(0)


def aim(step: Step, q: Tensor, group: Group, at: int) -> None:
    """Make every query see little but one token, at an edge of a tier: the `at`th."""
    for row in range(len(LENGTHS)):
        n, (k, _) = int(group.planes[0][1, row, 0]), step.read(group, row)
        if step.made:
            turned = torch.tensor(step.store.turned_by(n), dtype=torch.long)
            k = step.rebuilt(row).keys(k, turned.expand(k.shape[:2])).float()
        spans = [x for side in step.store.sides for x in step.store.spans(side, n).values()]
        ends, kept = sorted({i + step.store.sinks for x in spans for i in x}), step.store.numbers(n)
        wanted = ends[at // 2 % len(ends)] - at % 2
        key = k[:, kept.index(wanted) if wanted in kept else 0]
        far = 12 * step.dim**0.5 / key.square().sum(-1, keepdim=True).clamp_min(1e-6)
        q[row, :, 0] = (key * far).repeat_interleave(q.shape[1] // len(key), 0).to(step.dtype)


def walk(step: Step, run: Callable[..., Tensor], group: Group, arithmetic: Arithmetic,
         steps: int) -> None:
    """Some steps by the plain bodies on `group` and by `run(q, k, v, valid)`, which stores and
    returns o: it is within the rounding of a kernel of such `arithmetic`."""
    exact, wide = Arithmetic(), {name: x.float() for name, x in operands(step).items()}
    for at in range(steps):
        q, k, v = step.tokens(1, 2 + at)
        if at % 3:
            aim(step, q, group, at)
        valid = torch.ones(len(LENGTHS), 1, dtype=torch.bool)
        valid[at % len(LENGTHS)] = at % 2 == 0                     # a row of padding
        given, options = step.attend(q.float(), [x.float() for x in k], [x.float() for x in v],
                                     group.planes, valid)
        want = ATTEND(*given, **options, **wide)[0][:, :, 0]
        got = run(q, k, v, valid).float()[:, :, 0]
        assert got.shape == want.shape and not got[~valid[:, 0]].any(), "padding is not 0"
        for row in valid[:, 0].nonzero()[:, 0].tolist():
            seen = (torch.cat([old, new[-1][row].float()], 1)
                    for old, new in zip(step.read(group, row), (k, v), strict=True))
            view, how = View.exact(*seen), How(step.dim**-0.5)
            rough, ours, keys = None, None, step.rebuilt(row)
            if step.made:
                n = int(group.planes[0][1, row, 0])
                numbers = torch.tensor([*step.store.turned_by(n), n]).expand(view.k.shape[:2])
                rough, ours = (keys.rough(view.k, t) for t in (step.dtype, torch.float32))
                view = keys.view(view, numbers)
            most = (rounding(q[row, :, 0], view, how, arithmetic, rough)
                    + rounding(q[row, :, 0], view, how, exact, ours))
            off = (got[row] - want[row]).abs().double()
            assert (off <= most).all(), (
                f"row {row}: off by {float(off.max()):.3g}, allowed {float(most.min()):.3g}")
        APPEND(group.planes, k, v, valid.long(), valid, store=str(step.store), slots=[1])


def drawn_step(thing: Method | type[Format], data: Any) -> Step:
    """A step under a method with some parameters, or with a format on both sides."""
    made = None
    if isinstance(thing, type):
        both = data.draw(formats_of(thing).filter(lambda f: dims(f, "k") and dims(f, "v")))
        store = Store.parse(f"store(k={term_of(both)}, v={term_of(both)})")
    else:
        site = drawn_site(thing, data)
        store, made = site.store, site.made
    shape, dtype = Shape.drawn(store, data), data.draw(st.sampled_from(DTYPES))
    return Step(store, shape, dtype, drawn_making(made, shape, dtype, data))


def drawn_making(made: Any, shape: Shape, dtype: torch.dtype, data: Any) -> Any:
    """How keys are made, in the manner of `made`; in any manner or not at all, if that is None."""
    if made is None:
        if not data.draw(st.booleans()):
            return None
        basis = data.draw(st.booleans())
        made = module("kernels", "rebuild").Made(
            0, 2, basis, basis and data.draw(st.booleans()), data.draw(st.booleans()) or not basis,
            data.draw(st.sampled_from(("half", "interleaved"))))
    group = shape.q_heads // shape.heads
    dim = data.draw(st.sampled_from((shape.dim, 32, 80))) if made.basis else shape.dim
    keys = data.draw(st.sampled_from((group, 1))) if made.basis else 1
    rotary = data.draw(st.sampled_from((dim, dim // 2))) if made.rotary else 0
    angles = data.draw(st.sampled_from((dtype, torch.float32)))
    return made._replace(dim=dim, keys=keys, rotary=rotary, angles=angles, parts=dtype)
