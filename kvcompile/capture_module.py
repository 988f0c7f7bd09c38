"""Capture of a decoder that is plain PyTorch, by the structure of its graph.

    (input_ids [B, S], position_ids [B, S], valid [B, S], keep [N]) -> logits [B, N, V]

as `kvcompile.capture.export` gives it for Hugging Face models. The module's forward takes token
ids first and may take positions and a [B, S] mask of padding; it returns the logits, or a tuple,
mapping or object that holds them.
"""

import inspect
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from kvcompile.capture import _mutates, _plain, _why, evaluating, source
from kvcompile.errors import UnsupportedModelError
from kvcompile.rewrite import Refused
from kvcompile.structure.concrete import CASTS, Concrete, Inputs, Miss, argument, kind, value
from kvcompile.structure.emit import Emitter
from kvcompile.structure.operands import MOVES, follow
from kvcompile.structure.positions import use_position_ids
from kvcompile.structure.recognize import recognize

POSITIONS = ("position_ids", "positions", "input_pos", "pos")
PADDING = ("attention_mask", "padding_mask")
aten = torch.ops.aten


def export_module(module: nn.Module) -> GraphModule:
    """The functional stateless graph of `module`, parameters shared with it.

    Raises UnsupportedModelError, in one line that names the node, for a module without attention,
    with one that is not causal self-attention, and for positions that cannot be given from outside.
    """
    name = type(module).__name__
    gm = _export(module)
    ids, positions, valid, keep = (n for n in gm.graph.nodes if n.op == "placeholder")
    outcomes = recognize(gm, tokens=ids, positions=positions, padding=valid, valid=valid)
    if not outcomes:
        raise UnsupportedModelError(f"{name}: no attention was found in its graph")
    for outcome in outcomes:
        if isinstance(outcome, Refused):
            raise UnsupportedModelError(_refusal(gm, name, outcome))
    inputs = Inputs(ids, positions, valid)
    try:
        use_position_ids(gm, inputs)
    except Miss as miss:
        where = f"node '{miss.node.name}'{source(miss.node)} " if miss.node else ""
        raise UnsupportedModelError(f"{name}: {where}{miss.reason}") from None
    _keep(gm, inputs, keep)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


class _Stateless(nn.Module):
    """The forward that is exported; `mask` is the dtype in which the module reads padding."""

    def __init__(self, module: nn.Module, mask: torch.dtype) -> None:
        super().__init__()
        self.module, self.mask = module, mask
        self.tokens, *others = inspect.signature(module.forward).parameters.values()
        names = {p.name for p in others}
        self.positions = next((n for n in POSITIONS if n in names), None)
        self.padding = next((n for n in PADDING if n in names), None)
        for p in others:
            if p.default is p.empty and p.name not in (self.positions, self.padding) \
                    and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                raise UnsupportedModelError(
                    f"{type(module).__name__}.forward needs {p.name!r}; known are token ids, "
                    f"{' or '.join(POSITIONS)}, and {' or '.join(PADDING)}")

    def forward(self, input_ids: Tensor, position_ids: Tensor, valid: Tensor,
                keep: Tensor) -> Tensor:
        for other in (position_ids, valid):  # one pair of symbols; a buffer may limit their range
            for dim in (0, 1):
                torch._check(other.shape[dim] == input_ids.shape[dim])
        given = ((self.positions, position_ids), (self.padding, valid.to(self.mask)))
        out = self.module(input_ids, **{name: x for name, x in given if name})
        if isinstance(out, Mapping):
            out = out.get("logits", next(iter(out.values())))
        out = getattr(out, "logits", out)
        return out[0] if isinstance(out, tuple | list) else out


def _export(module: nn.Module) -> GraphModule:
    """The graph with the placeholders of the convention and one result, the logits."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    ids = torch.full((2, 16), 3, device=device)
    positions = torch.arange(16, device=device).expand(2, -1).contiguous()
    example = (ids, positions, torch.ones_like(ids, dtype=torch.bool),
               torch.arange(3, device=device))
    size = torch.export.Dim.DYNAMIC(min=1)
    shapes = ({0: size, 1: size}, {0: size, 1: size}, {0: size, 1: size}, {0: size})
    masks = [torch.long, torch.bool]
    while True:
        wrapper = _Stateless(module, masks.pop(0))
        try:
            with torch.no_grad(), evaluating(module):
                program = torch.export.export(wrapper, example, dynamic_shapes=shapes,
                                              strict=False)
            break
        except Exception as error:
            if not (wrapper.padding and masks):
                raise UnsupportedModelError(_why(module, error)) from error  # type: ignore[arg-type]
    for node in [n for n in program.graph.nodes if kind(n) == "detach_"]:  # of a constant
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)
    if any(_mutates(n) for n in program.graph.nodes):
        program = program.run_decompositions({})
    changed = program.graph_signature.buffers_to_mutate
    if changed:
        raise UnsupportedModelError(f"{type(module).__name__} changes its buffer "
                                    f"'{next(iter(changed.values()))}' when it is called")
    return _plain(program.module(check_guards=False))


def _refusal(gm: GraphModule, name: str, refused: Refused) -> str:
    node = next((n for n in gm.graph.nodes if n.name == refused.node), None)
    return (f"{name}: attention {refused.layer} is not one that kvcompile can cache: node "
            f"'{refused.node}'{source(node) if node else ''} {refused.reason}")


def _keep(gm: GraphModule, inputs: Inputs, keep: Node) -> None:
    """Logits of the columns `keep` alone.

    They are selected before the last linear, if what follows is pointwise; a module that takes the
    last column itself there is made to take these instead.
    """
    output = gm.graph.output_node()
    logits = output.args[0]
    if not isinstance(logits, Node) or value(logits).dim() != 3:
        raise UnsupportedModelError("the first result is no tensor [batch, tokens, vocab]")
    emit, tail, node = Emitter(gm.graph, inputs), [], logits
    while len(node.users) == 1 and (before := _pointwise(node)):
        tail.append(node)
        node = before
    if kind(node) == "linear" and len(node.users) == 1:
        tail.append(node)
        node = argument(node)
    else:
        tail, node = [], logits
    last = tail[-1] if tail else output
    with gm.graph.inserting_before(last):
        every = _every_token(gm, inputs, node)
        kept = emit.call(aten.index_select.default, every, 1, keep, like=node)
    last.replace_input_with(node, kept)
    for node in reversed(tail):
        emit.update(node)


def _every_token(gm: GraphModule, inputs: Inputs, node: Node) -> Node:
    """`node` [batch, tokens, ..], or the tensor from which it takes the last token."""
    both = [Concrete(gm, inputs, n) for n in (5, 7)]
    chain: list[Node] = []
    while [c.shape(node)[1] for c in both] != [c.tokens for c in both]:
        if kind(node) not in MOVES:
            raise UnsupportedModelError(f"logits of all tokens are needed, '{node.name}' has "
                                        f"{both[0].shape(node)[1]}")
        chain.append(node)
        node = argument(node)
    for at in both if chain else ():
        index = torch.arange(prod(at.shape(node))).view(at.shape(node))
        if not torch.equal(follow(at, chain, index), index[:, -1:]):
            raise UnsupportedModelError(f"'{chain[-1].name}' takes other tokens than the last")
    return node


def _pointwise(node: Node) -> Node | None:
    """The one operand of a pointwise op that is shaped like its result, if the rest is constant."""
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    same = kind(node) in CASTS | {"alias", "clone", "contiguous", "detach"}
    if not (same or torch.Tag.pointwise in getattr(node.target, "tags", ())):
        return None
    large = [n for n in tensors if value(n).dim() > 1]
    return large[0] if len(large) == 1 and value(large[0]).dim() == value(node).dim() else None
