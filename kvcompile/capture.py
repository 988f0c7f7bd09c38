"""Capture: a Hugging Face causal LM -> fx graph of its stateless forward.

    (input_ids [B, S], position_ids [B, S], valid [B, S], keep [N]) -> logits [B, N, V]

with one kvc.attention per layer. `valid` is False for padding and `keep` lists the columns whose
logits are wanted. The model runs under torch.export with its attention and mask functions replaced
through transformers' interfaces, and is left exactly as it was.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvcompile.backend.inductor import lazy_graphs
from kvcompile.errors import UnsupportedModelError
from kvcompile.ir import argument, attention_nodes
from kvcompile.structure.lazy import LazyGraphModule

log = logging.getLogger(__name__)

ATTRIBUTE = "_attn_implementation_internal"  # of a config, set without its checks
NAME = "kvcompile"  # the attention implementation under which models are traced
IGNORED = {"is_causal", "position_ids", "use_cache", "cache_position",
           "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep"}
TOKENS = 37  # a prime that no other dimension is likely to have, to recognise the token axis by
PROBE = 96  # tokens over which mask functions are compared with causal and window masks


@dataclass
class _Trace:
    """What the interface functions need to know of the forward that is being traced."""

    positions: Tensor
    valid: Tensor
    masks: list[Callable] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)


_trace: _Trace | None = None


def _attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any,
               dropout: float = 0.0, scaling: float | None = None,
               sliding_window: int | None = None, softcap: float | None = None,
               s_aux: Tensor | None = None, **rest: Any) -> tuple[Tensor, None]:
    """The attention function of implementation "kvcompile": emits one kvc.attention node.

    The first six are in transformers' order, since what wraps attention functions passes these by
    position. Dropout is 0 in evaluation mode.
    """
    if _trace is None:
        raise UnsupportedModelError("attn_implementation='kvcompile' serves capture alone; "
                                    "call kvcompile.optimize(model) instead of setting it")
    where = type(module).__name__
    if attention_mask is not None:
        raise UnsupportedModelError(f"{where} makes its own attention mask; only causal and "
                                    "sliding-window masks are supported")
    odd = [n for n, x in rest.items() if x is not None and x is not False and n not in IGNORED]
    if odd:
        raise UnsupportedModelError(f"{where} passes {', '.join(odd)} to attention, which "
                                    "kvcompile does not know")
    if not getattr(module, "is_causal", True) or rest.get("is_causal") is False:
        raise UnsupportedModelError(f"{where} is not causal: {type(module).__name__} attends to "
                                    "later tokens, so there is nothing to cache")
    layer = getattr(module, "layer_idx", None)
    _trace.layers.append(len(_trace.layers) if layer is None else layer)
    o = torch.ops.kvc.attention(
        q, k, v, _trace.positions, _trace.valid, s_aux,
        scale=q.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window or 0, softcap=softcap or 0.0, layer=_trace.layers[-1])
    return o.transpose(1, 2), None


def _mask(*args: Any, mask_function: Callable | None = None, **kwargs: Any) -> None:
    """The mask function of implementation "kvcompile": no mask, but remembers what it should be."""
    if _trace is not None and mask_function is not None:
        _trace.masks.append(mask_function)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class _Stateless(nn.Module):
    """The forward that is exported."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.options = inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, position_ids: Tensor, valid: Tensor, keep: Tensor
                ) -> Tensor:
        global _trace
        _trace = _Trace(position_ids, valid)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": valid.long(),
                                  "use_cache": False}
        if "position_ids" in self.options:
            inputs["position_ids"] = position_ids
        if "logits_to_keep" in self.options:
            inputs["logits_to_keep"] = keep
        logits = self.model(**inputs).logits
        return logits if "logits_to_keep" in self.options else logits[:, keep]


@contextmanager
def _as_traced(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, on our attention; everything is put back afterwards."""
    global _trace
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    for config in list(configs.values()):  # sub-configurations carry an implementation each
        for value in vars(config).values():
            if hasattr(value, "_attn_implementation"):
                configs.setdefault(id(value), value)
    attention = [(c, c.__dict__.get(ATTRIBUTE)) for c in configs.values()]
    try:
        for config, _ in attention:
            setattr(config, ATTRIBUTE, NAME)
        with evaluating(model):
            yield
    finally:
        _trace = None
        for config, value in attention:
            setattr(config, ATTRIBUTE, value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; every module's own mode is put back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def export(model: PreTrainedModel) -> torch.fx.GraphModule:
    """The functional stateless graph of `model`, parameters shared with it.

    Raises UnsupportedModelError, in one line, for what is not a causal decoder, for masks other
    than causal and window ones, and for a capture that fails (with the op and the source line).
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers causal LM: it "
                                    "cannot generate()")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder; kvcompile "
                                    "compiles decoder-only models")
    b, s, n = (torch.export.Dim(x, min=1, max=2**20) for x in ("batch", "tokens", "wanted"))
    shapes = ({0: b, 1: s}, {0: b, 1: s}, {0: b, 1: s}, {0: n})
    try:
        gm, masks = _export(model, 2, 16, shapes)
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(_why(model, error)) from error
    _check_sites(model, gm, masks)
    return gm


def export_fixed(model: PreTrainedModel, tokens: int) -> torch.fx.GraphModule:
    """The graph for one row of exactly `tokens` tokens, of whatever kind the model is."""
    return _export(model, 1, tokens, None)[0]


def _export(model: PreTrainedModel, batch: int, tokens: int,
            shapes: Any) -> tuple[torch.fx.GraphModule, list[Callable]]:
    """(graph, mask functions that the model asked for)."""
    device = model.device
    ids = torch.full((batch, tokens), 3, dtype=torch.long, device=device)
    positions = torch.arange(tokens, device=device).expand(batch, -1).contiguous()
    example = (ids, positions, torch.ones_like(ids, dtype=torch.bool),
               torch.arange(3, device=device))
    with torch.no_grad(), lazy_graphs(), _as_traced(model):
        program = torch.export.export(_Stateless(model), example, dynamic_shapes=shapes,
                                      strict=False)
        masks = list(_trace.masks) if _trace else []
    with lazy_graphs():
        if any(_mutates(n) for n in program.graph.nodes):  # slow, and few models write in place
            program = program.run_decompositions({})
        return _plain(program.module(check_guards=False)), masks


def _mutates(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _plain(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Positional arguments and a plain result; no guards, no assertions."""
    gm.graph.set_codegen(torch.fx.graph.CodeGen())
    for node in list(gm.graph.nodes):
        if node.op == "call_module" or (
            node.op == "call_function" and "_assert" in str(node.target) and not node.users
        ):
            gm.graph.erase_node(node)
    output = gm.graph.output_node()
    result = output.args[0]
    output.args = (result[0] if isinstance(result, (tuple, list)) else result,)
    gm.graph.eliminate_dead_code()
    out = LazyGraphModule(gm, gm.graph)
    out.eval()
    return out


def _check_sites(model: PreTrainedModel, gm: torch.fx.GraphModule, masks: list[Callable]) -> None:
    nodes = attention_nodes(gm.graph)
    name = type(model).__name__
    if not nodes:
        raise UnsupportedModelError(f"{name}: no layer of it calls transformers' attention "
                                    f"interface{_softmax(gm)}")
    layers: list[int] = [argument(n, "layer") for n in nodes]
    if len(set(layers)) != len(layers):
        raise UnsupportedModelError(f"{name} attends more than once in a layer ({layers}); "
                                    "one cache a layer is supported")
    windows: set[int] = {argument(n, "window") for n in nodes}
    seen = {_window_of(mask, {0, *windows}): mask for mask in masks}
    if None in seen:
        raise UnsupportedModelError(f"{name} masks attention by {_name(seen[None])}, which is "
                                    "neither a causal mask nor one with a window that its layers "
                                    f"name ({sorted(windows)})")
    if masks and not windows <= set(seen):
        raise UnsupportedModelError(f"{name} has layers with windows {sorted(windows)} but makes "
                                    f"masks with windows {sorted(w for w in seen if w)}")


def _window_of(mask: Callable, windows: set[int]) -> int | None:
    """Which of `windows` (0: none) the mask function is, on tokens around the windows' edges."""
    size = PROBE + 2 * max(windows)
    kv = torch.unique(torch.cat([torch.arange(PROBE)] + [
        (size - 1 - torch.arange(w - PROBE // 2, w + PROBE // 2)).clamp(0, size - 1)
        for w in windows]))
    q = torch.tensor([0, 1, PROBE // 2, size // 2, size - 1])[:, None]
    zero = torch.zeros((), dtype=torch.long)
    try:
        got = torch.as_tensor(mask(zero, zero, q, kv[None])).expand(q.shape[0], kv.shape[0])
        for window in windows:
            want = (kv[None] <= q) & ((kv[None] > q - window) if window else True)
            if torch.equal(got, want):
                return window
    except Exception as error:  # a function of data that is gone, such as image tokens
        log.debug("mask function %s failed on plain indices: %s", mask, error)
    return None


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", type(function).__name__).replace("<locals>.", "")


def _softmax(gm: torch.fx.GraphModule) -> str:
    for node in gm.graph.nodes:
        if "softmax" in str(node.target):
            return f"; it attends at node '{node.name}'{source(node)} by itself"
    return ""


def source(node: torch.fx.Node) -> str:
    """` (file.py:123)`: the line of model code that made `node`, if it is known."""
    trace = node.meta.get("stack_trace") or ""
    lines = [x.strip() for x in trace.splitlines() if x.strip().startswith("File ")]
    if not lines:
        return ""
    path, line = lines[-1].split('"')[1], lines[-1].split("line ")[1].split(",")[0]
    return f" ({path.rsplit('/', 1)[-1]}:{line})"


def _why(model: PreTrainedModel, error: Exception) -> str:
    """One line for a failed export: what failed, in which op, at which line of the model."""
    from kvcompile.checks.self_check import mixer

    text = next((x for x in str(error).splitlines() if x.strip()), type(error).__name__).strip()
    place, tb = "", error.__traceback__
    while tb is not None:
        path = tb.tb_frame.f_code.co_filename
        if not any(x in path for x in ("/torch/", "/kvcompile/", "contextlib.py", "<")):
            place = f" in {tb.tb_frame.f_code.co_name} ({path.rsplit('/', 1)[-1]}:{tb.tb_lineno})"
        tb = tb.tb_next
    if "Constraints violated" in text:  # it computes on the number of tokens: what does?
        try:
            mixes = mixer(export_fixed(model, TOKENS), model, TOKENS)
        except Exception as second:
            log.debug("no graph of fixed length either: %s", second)
            mixes = ""
        text = "its graph depends on the number of tokens"
        place = mixes or place
    return f"{type(model).__name__} cannot be captured: {text[:300]}{place}"
