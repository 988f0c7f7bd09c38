"""The plain PyTorch body of kvc.rope."""

import torch
from torch import Tensor

from kvcompile.ir import body


@body("rope", inline=True)
def rope(x: Tensor, cos: Tensor, sin: Tensor, *, style: str) -> Tensor:
    """Rotate the first cos.shape[-1] channels of x [B, H, S, D]; the others pass through.

    cos and sin broadcast against [B, H, S, R] and repeat each angle for both channels of a pair:
    (i, i + R / 2) for style "half", (2 i, 2 i + 1) for style "interleaved".
    """
    r = cos.shape[-1]
    head = x[..., :r]
    if style == "half":
        (a, b), (c, d), (s, t) = (y.chunk(2, -1) for y in (head, cos, sin))
        parts = [a * c - b * s, b * d + a * t]
    else:
        a, b = head.unflatten(-1, (-1, 2)).unbind(-1)
        parts = [head * cos + torch.stack([-b, a], -1).flatten(-2) * sin]
    if r < x.shape[-1]:
        parts.append(x[..., r:])
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0].contiguous()
