"""The mandatory check: decoding with a cache must compute what the model computes without one."""

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from transformers import PreTrainedModel

from kvcompile.capture import source
from kvcompile.errors import UnsupportedModelError
from kvcompile.ir import ATTENTION
from kvcompile.program import Program

PROMPT, STEPS = 7, 2


def self_check(model: PreTrainedModel, program: Program) -> None:
    """Compare the model itself, its stateless graph, and prefill(7) + 2 decode steps under `full`.

    Raises UnsupportedModelError that names the first node, other than attention, that mixes tokens.
    """
    from kvcompile.own_cache import OwnCache
    from kvcompile.engine import Engine

    exact = program.lower("full")
    device, total = model.device, PROMPT + STEPS
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (1, total), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(total, device=device)[None]
    valid = torch.ones(1, total, dtype=torch.bool, device=device)
    with torch.no_grad():
        training = model.training
        model.eval()
        want = model(input_ids=ids, use_cache=False).logits
        model.train(training)
        stateless = exact.graph_module(ids, positions, valid, torch.arange(total, device=device))
        engine, got = Engine(exact, compile=False), []
        cache = OwnCache(engine.sites, "full", "self-check")
        for start, end in [(0, PROMPT)] + [(PROMPT + i, PROMPT + i + 1) for i in range(STEPS)]:
            at = slice(start, end)
            got.append(engine.run(cache, ids[:, at], positions[:, at], valid[:, at],
                                  torch.arange(end - start, device=device)))
    name = type(model).__name__
    if not _close(want, stateless):
        raise UnsupportedModelError(
            f"{name}: its captured graph gives other logits than the model (by "
            f"{_difference(want, stateless):.2g}){_mixer_text(model, exact.graph_module)}")
    if not _close(stateless, torch.cat(got, 1)):
        raise UnsupportedModelError(
            f"{name}: decoding with a cache gives other logits than the whole sequence (by "
            f"{_difference(stateless, torch.cat(got, 1)):.2g})"
            f"{_mixer_text(model, exact.graph_module)}")


def _difference(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def _close(want: Tensor, got: Tensor) -> bool:
    """Within the rounding of some hundred operations in the model's dtype, on the logits' scale."""
    eps = torch.finfo(want.dtype).eps
    return _difference(want, got) <= max(256 * eps, 1e-4) * (1 + want.float().abs().max().item())


def _mixer_text(model: PreTrainedModel, gm: GraphModule) -> str:
    node = mixer(gm, model)
    if node is None:
        return ""
    return (f": node '{node.name}' ({node.target}){source(node)} mixes tokens and is not attention")


def mixer(gm: GraphModule, model: nn.Module) -> Node | None:
    """The first node, other than attention, through which a later token sees an earlier one.

    Runs the graph on two prompts that differ in their first token, everything else being taken from
    the first run, and looks for a node whose later tokens differ.
    """
    tokens = 37  # a prime that no other dimension is likely to have
    device = next(model.parameters()).device
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (1, tokens), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % vocab
    positions = torch.arange(tokens, device=device)[None]
    rest = (positions, torch.ones_like(positions, dtype=torch.bool), positions[0])
    runs = [_Record(gm, tokens), _Record(gm, tokens)]
    with torch.no_grad():
        runs[0].run(ids.to(device), *rest)
        runs[1].attention = runs[0].attention  # what attention mixes is taken from the first run
        runs[1].run(other.to(device), *rest)
    for node in gm.graph.nodes:
        a, b = runs[0].values.get(node), runs[1].values.get(node)
        if a is None or b is None:
            continue
        axis = next((i for i, s in enumerate(a.shape) if s == tokens), None)
        later = (a.narrow(axis, 1, tokens - 1), b.narrow(axis, 1, tokens - 1)) if (
            axis is not None) else (a, b)
        if not torch.equal(*later) and node.op == "call_function":
            return node
    return None


class _Record(Interpreter):
    """Keeps every tensor of a run; attention's results come from `attention` if it is filled."""

    def __init__(self, gm: GraphModule, tokens: int) -> None:
        super().__init__(gm)
        self.values: dict[Node, Tensor] = {}
        self.attention: dict[Node, Tensor] = {}

    def run_node(self, n: Node):
        if n.target is ATTENTION and n in self.attention:
            return self.attention[n]
        out = super().run_node(n)
        if isinstance(out, Tensor) and n.op == "call_function":
            self.values[n] = out
            if n.target is ATTENTION:
                self.attention[n] = out
        return out
