"""What a store gives back of K and V, and attention over it, without a cache: for calibration."""

import torch
from torch import Tensor

from kvcompile.calibration.samples import Sample
from kvcompile.format import Side
from kvcompile.kernels.dense_attention import attend_row
from kvcompile.store import SIDES, Store


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|."""
    return float((got - want).norm() / want.norm())


def attend(sample: Sample, store: Store, context: int) -> Tensor:
    """o [N, Hq, T - context, Dv] in fp32 of the tokens after `context` stored ones."""
    k, v = (torch.cat([seen(store, side, x[..., :context, :]), x[..., context:, :].float()], -2)
            for side, x in zip(SIDES, (sample.k, sample.v), strict=True))
    rows = zip(sample.q[..., context:, :].float(), k, v, strict=True)
    return torch.stack([attend_row(q, k, v, sample.scale, sample.window, sample.softcap,
                                   sample.sinks)[0] for q, k, v in rows])


def seen(store: Store, side: Side, x: Tensor) -> Tensor:
    """What `store` gives back, in fp32, once it was given the tokens x [..., T, D]."""
    spans, x = store.spans(side, x.shape[-2]), x.float()
    start, end = (store.sinks + n for n in spans["body"])
    parts = [x[..., : spans["sinks"].end, :]]
    if end > start:
        fmt, dim = store.side(side).format, x.shape[-1]
        parts.append(fmt.decode(fmt.encode(x[..., start:end, :], side), dim, torch.float32, side))
    parts.append(x[..., store.sinks + spans["recent"].start :, :])
    return torch.cat(parts, -2)
