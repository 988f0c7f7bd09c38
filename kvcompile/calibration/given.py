"""Factors of projections that were found elsewhere, by training perhaps: a safetensors file.

    ...layers.3.self_attn.k_proj_a.weight    A [groups r, in], or [W_k; A], as CSKV's programs do
    ...layers.3.self_attn.k_proj_b.weight    B [H D, r]

and the same of v_proj, for each layer that is factored: K_g = B_g A_g x, g a group of heads. Of
bases of K and V themselves, as MatryoshkaKV trains them, there is B alone: its columns are the
directions of a head, the most important first.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvcompile.calibration.factor import Factors
from kvcompile.errors import RecipeError


def given(file: str, layer: int, side: str, groups: int, weight: Tensor, rank: int = 0
          ) -> list[Factors]:
    """A layer's factors in fp64, one pair for each group of heads, of weight [H D, in].

    With a `rank` they are of that many latents, the first, and B_g must be orthonormal; A_g is then
    B_g^T W_g. RecipeError for a file or factors that do not fit.
    """
    tensors, (channels, width) = _read(file, _changed(file)), weight.shape
    b = _named(tensors, layer, f"{side}_proj_b")
    if b is None:
        raise RecipeError(f"{file}: holds no layers.{layer}.self_attn.{side}_proj_b.weight")
    where = f"{file}: layers.{layer}.self_attn.{side}_proj"
    if b.dim() != 2 or b.shape[0] != channels or not 0 < b.shape[1] <= channels // groups:
        raise RecipeError(f"{where}_b is {_shape(b)}, not [{channels}, at most "
                          f"{channels // groups}]")
    up, a = b.double().unflatten(0, (groups, -1)), _named(tensors, layer, f"{side}_proj_a")
    own = weight.double().cpu().unflatten(0, (groups, -1))
    if rank:
        off = float((up.mT @ up - torch.eye(up.shape[-1]).double()).abs().max())
        if off > 1e-2:
            raise RecipeError(f"{where}_b is not orthonormal head by head: off by {off:.2g}")
        if rank > up.shape[-1]:
            raise RecipeError(f"{where}_b has {up.shape[-1]} columns, {rank} are needed")
        up = up[..., :rank]
        down = up.mT @ own
    elif a is None:
        raise RecipeError(f"{file}: holds no layers.{layer}.self_attn.{side}_proj_a.weight")
    elif a.dim() == 2 and a.shape[0] in (groups * b.shape[1], channels + groups * b.shape[1]) and (
            a.shape[1] == width):
        down = a[-groups * b.shape[1] :].double().unflatten(0, (groups, -1))
    else:
        raise RecipeError(f"{where}_a is {_shape(a)}, not [{groups * b.shape[1]}, {width}]")
    made = list[Factors]()
    for w, u, d in zip(own, up, down, strict=True):
        lost = (w - u @ d).square().sum() / w.square().sum()
        made.append(Factors(d.to(weight.device), u.to(weight.device), 1 - float(lost)))
    return made


def _named(tensors: Mapping[str, Tensor], layer: int, what: str) -> Tensor | None:
    name = f"layers.{layer}.self_attn.{what}.weight"
    return next((x for key, x in tensors.items() if f".{key}".endswith(f".{name}")), None)


def _shape(x: Tensor) -> str:
    return str([*x.shape])


def _changed(file: str) -> float:
    try:
        return Path(file).stat().st_mtime
    except OSError as error:
        raise RecipeError(f"factors: {file} cannot be read: {error.strerror}") from None


@cache
def _read(file: str, changed: float) -> dict[str, Tensor]:
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"factors: {file} is no safetensors file: {error}") from None
