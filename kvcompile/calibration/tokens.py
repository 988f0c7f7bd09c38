"""Classes of tokens: which ids of a vocabulary have a text of some kind."""

from collections.abc import Callable
from typing import Any

from kvcompile.calibration.samples import Samples
from kvcompile.errors import RecipeError


def tokenizer_of(samples: Samples, method: str, name: str) -> Any:
    """The tokenizer; RecipeError where the parameter `name` can be found by none."""
    if samples.tokenizer is None:
        raise RecipeError(f"{method}: {name} are token ids: give optimize(..., tokenizer=tokenizer)"
                          f", which tells them, or {name}=[...]")
    return samples.tokenizer


def ids_where(tokenizer: Any, accepts: Callable[[str], bool]) -> tuple[int, ...]:
    """The ids of the tokens whose text is accepted, ascending; special ones are left out."""
    special = {*tokenizer.all_special_ids}
    return tuple(i for i in range(len(tokenizer))
                 if i not in special and accepts(tokenizer.decode([i])))


def checked_ids(method: str, name: str, ids: Any) -> tuple[int, ...]:
    """`ids`; RecipeError for what cannot be token ids."""
    wrong = next((i for i in ids if type(i) is not int or i < 0), None)
    if wrong is not None:
        raise RecipeError(f"{method}: {name} must be token ids, whole numbers from 0, not {wrong}")
    return tuple(ids)
