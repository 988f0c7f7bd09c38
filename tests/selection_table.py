"""The table of docs/selection.md: what SmolLM2 still knows of 4,000 tokens of which some are kept.

    python tests/selection_table.py out.jsonl [--examples N] [--ratios 0.5 0.25] [recipe ...]

A recipe may hold {ratio}. The prompts are those of `kvcompile eval --needles`; as every method
attends to the exact prompt, each is run once, and its q, K and V are given to all. Perplexity is of
the prose that follows a context, 64 tokens in one call, or 8 where tokens are evicted while
decoding. Of an answer the share of its digits counts that are likeliest after those before them,
because this model seldom gets all five right at this length. One line of JSON a row, as soon as it
is known; what OUT holds already is not run again. `--print` prints the table.

    python tests/selection_table.py out.jsonl --speed [--context N] [--steps N] [--ratios 0.25]

appends, for the few recipes of `SPEED` or those given, the milliseconds of a compiled decode step
after such a context, the median of steps interleaved with those of `full`; `--print` shows them.
"""

import argparse
import copy
import gc
import json
import math
import operator
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn.functional import cross_entropy

import kvcompile
from kvcompile.ir import SCORE, argument, attention_nodes
from kvcompile.measure.prose import prose
from kvcompile.measure.recall import example
from kvcompile.models.smollm2 import smollm2, topics_ids
from kvcompile.rule import Rule

TOKENS, SCORED = 4000, 65
BLIND = ("random", "knorm", "keydiff", "expected_attention", "lagkv", "qfilters",
         "streamingllm-slots", "kvzip", "compactor")  # the same whether the last queries ask
RECIPES = (
    "random(ratio={ratio})", "snapkv(ratio={ratio})",
    "streamingllm-slots(ratio={ratio}, positions=original)", "tova(ratio={ratio})",
    "knorm(ratio={ratio})", "keydiff(ratio={ratio})", "adakv(ratio={ratio})",
    "expected_attention(ratio={ratio})", "criticalkv(ratio={ratio})", "pyramidkv(ratio={ratio})",
    "chunkkv(ratio={ratio})", "finch(ratio={ratio})", "lagkv(ratio={ratio})", "r-kv(ratio={ratio})",
    "streamingllm-slots(ratio={ratio})", "think(drop=0.5)", "think(drop=0.5)+snapkv(ratio={ratio})",
    "h2o(ratio={ratio})", "cake(ratio={ratio})", "scissorhands(ratio={ratio})",
    "finch(ratio={ratio}, positions=original)", "qfilters(ratio={ratio})",
    "duoattention(full={ratio})", "d2o(ratio={ratio})", "cam(ratio={ratio})",
    "compactor(ratio={ratio})", "hashevict(ratio={ratio})", "vatp(ratio={ratio})",
    "a2sf(ratio={ratio})", "caote(ratio={ratio})", "kvzip(ratio={ratio})",
    *(f"headkv(budget={n})" for n in (2000, 1000, 400)),
    *(f"topp(p={p})" for p in (0.9, 0.7, 0.4)),
    "razorattention(induction=0.36, recent=800)", "razorattention(induction=0.05, recent=800)",
    "razorattention(induction=0.02, recent=256, share=0.07)",
    "simlayerkv", "simlayerkv(above=0.5)", "simlayerkv(above=0.5, recent=256)",
    *(f"kvmerger(alike={x})" for x in (0.9, 0.75, 0.5)),
    "sepllm(recent=256)", "sepllm(recent=256, most=256)",
    *(f"fastgen(recover={x})" for x in (0.95, 0.8, 0.6)), "mikv", "zipcache")
SPEED = ("snapkv(ratio={ratio})", "pyramidkv(ratio={ratio})", "adakv(ratio={ratio})",
         "h2o(ratio={ratio})", "tova(ratio={ratio})", "streamingllm(window=1024)",
         "knorm(ratio={ratio})", "kvzip(ratio={ratio})", "duoattention(full={ratio})")


class Text:
    """One prompt, its question and answer, the prose that follows it, and what attention saw."""

    def __init__(self, model: Any, tokenizer: Any, keys: int, seed: int) -> None:
        e = example(model, tokenizer, TOKENS, keys, seed)
        self.keys, self.context, self.question = keys, e.context, e.question
        self.answer = torch.tensor([tokenizer(" " + e.answer, add_special_tokens=False).input_ids])
        self.digits = len(e.answer)
        self.follows = prose(model, tokenizer, SCORED, 1000 * seed + TOKENS)
        self.seen: list[tuple[torch.Tensor, ...]] = []
        alone = model.kvcompile.engine.alone
        alone.attention = lambda q, k, v, *a, **o: (
            self.seen.append((q, k, v)), type(alone).attention(alone, q, k, v, *a, **o))[1]
        self.ids = torch.cat([self.context, self.question], 1)
        model.kvcompile.engine._graphs.clear()
        self.exact = model(self.ids, use_cache=True, logits_to_keep=1).past_key_values
        self.scores: dict[tuple, Any] = {}

    def tokens(self, aware: bool) -> int:
        """Tokens of the prompt that is compressed."""
        return self.ids.shape[1] - 1 if aware else self.context.shape[1]

    def compressed(self, model: Any, aware: bool) -> Any:
        """The cache that `model` would make of the prompt."""
        tokens = self.tokens(aware)
        if not model.kvcompile.engine.rules:
            cache = copy.deepcopy(self.exact)
            cache.crop(tokens)
            return cache
        if any("probe" in rule.needs for rule in model.kvcompile.engine.rules):
            model.kvcompile.engine.alone.compile = True  # it reads the prompt twice
            return kvcompile.prefill(model, self.ids[:, :tokens])
        positions = torch.arange(tokens)[None]
        valid = torch.ones(1, tokens, dtype=torch.bool)
        cache = model.kvcompile.new_cache()
        cache.begin(valid, positions)
        question = self.question.shape[1] - 1 if aware else 0
        kept = self._kept(model.kvcompile.program.phases["prefill"], positions, valid,
                          torch.tensor([0, question]))
        cache.store(kept, model.kvcompile.engine.alone.append, tokens)
        cache.commit(tokens)
        return cache

    def _kept(self, gm: Any, positions: torch.Tensor, valid: torch.Tensor, hints: torch.Tensor
              ) -> Any:
        """The graph's last output, from the q, K and V that attention is known to see."""
        tokens, known = positions.shape[1], dict[Node, Any]()
        holders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        known |= dict(zip(holders[:3], (self.ids[:, :tokens], positions, valid), strict=True))
        known[holders[-1]] = hints
        for node, seen in zip(attention_nodes(gm.graph), self.seen, strict=True):
            known |= {argument(node, n): x[:, :, :tokens] for n, x in
                      zip("qkv", seen, strict=True)}

        def value(node: Node) -> Any:
            if node not in known:
                known[node] = compute(node)
            return known[node]

        def compute(node: Node) -> Any:
            if node.op == "get_attr":
                return operator.attrgetter(str(node.target))(gm)
            args, kwargs = map_arg((node.args, dict(node.kwargs)), value)
            if node.target is not SCORE:
                return node.target(*args, **kwargs)
            rule = Rule.parse(kwargs["rule"])
            key = (str(rule.score), rule.budget.name, rule.layer, int(hints[1]))
            if key not in self.scores:
                self.scores[key] = node.target(*args, **kwargs)
            return tuple(x.clone() for x in self.scores[key])

        return map_arg(gm.graph.output_node().args[0][-1], value)


@torch.no_grad()
def logits(model: Any, cache: Any, ids: torch.Tensor, step: int) -> torch.Tensor:
    """[S, V] of `ids` [1, S] on a copy of `cache`, `step` tokens a call."""
    own = copy.deepcopy(cache)
    own.owner = model.kvcompile.owner
    return torch.cat([model(part, past_key_values=own, use_cache=True).logits[0]
                      for part in ids.split(step, 1)])


def row(model: Any, recipe: str, ratio: float | None, texts: list[Text]) -> dict[str, Any]:
    """What is known of a recipe: shares of digits, nats per token, bytes as a share."""
    out: dict[str, Any] = {"recipe": recipe, "ratio": ratio}
    step = 8 if any(rule.every for rule in model.kvcompile.engine.rules) else SCORED
    blind = recipe.partition("(")[0] in BLIND
    losses, nbytes, share = [], [], []
    right: dict[tuple[int, bool], list[float]] = {}
    for text in texts:
        for aware in (False,) if blind else (False, True):
            cache = text.compressed(model, aware)
            if not aware:
                nbytes.append(cache.nbytes)
                share.append(cache.nbytes / text.exact.nbytes)
                got = logits(model, cache, text.follows[:, :-1], step)
                losses.append(float(cross_entropy(got.float(), text.follows[0, 1:])))
            ask = torch.cat([text.ids[:, text.tokens(aware):], text.answer], 1)
            said = logits(model, cache, ask[:, :-1], ask.shape[1]).argmax(-1)
            fine = (said == ask[0, 1:])[-text.digits:].float().mean()
            right.setdefault((text.keys, aware), []).append(float(fine))
    out |= {"texts": len(texts), "nbytes": sum(nbytes) // len(nbytes),
            "share": sum(share) / len(share), "perplexity": math.exp(sum(losses) / len(losses))}
    for (keys, aware), fine in right.items():
        kind = f"{'needle' if keys > 1 else 'passkey'}.{'aware' if aware else 'agnostic'}"
        out[kind] = sum(fine) / len(fine)
    return out


@torch.no_grad()
def step_times(model: Any, held: Any, recipe: str, ids: torch.Tensor, steps: int, calibration: Any
               ) -> dict[str, Any]:
    """Median milliseconds of `recipe`'s and of full's decode step after the prompt `ids`, which the
    cache `held` of `model`, full, holds."""
    both, took = (kvcompile.optimize(model, recipe, calibration=calibration), model), ([], [])
    caches = [kvcompile.prefill(both[0], ids), copy.deepcopy(held)]
    for step in range(steps + 3):                        # the first ones compile and warm up
        for m, cache, mine in zip(both, caches, took, strict=True):
            start = time.perf_counter()
            m(ids[:, :1], past_key_values=cache, use_cache=True)
            if step >= 3:
                mine.append(1000 * (time.perf_counter() - start))
    ms, full = map(statistics.median, took)
    return {"recipe": recipe, "speed": {"context": ids.shape[1], "steps": steps, "ms": ms,
                                        "full": full}}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, and below those whose speed is known."""
    known = [r for r in rows if "speed" in r]
    rows = [r for r in rows if "speed" not in r]
    head = ("recipe", "KV bytes", "of full", "perplexity", "passkey", "needle", "passkey, asked",
            "needle, asked")
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * 7 + "|"] if rows else []
    if known:
        speeds = ["| recipe | context | ms per token | full beside it | of full |",
                  "|---" + "|---:" * 4 + "|"]
        speeds += [f"| `{r['recipe']}` | {s['context']:,} | {s['ms']:.1f} | {s['full']:.1f} | "
                   f"{s['ms'] / s['full']:.2f} |" for r in known for s in (r["speed"],)]
        return "\n".join([*([table(rows), ""] if rows else []), *speeds])
    for r in rows:
        right = [r.get(f"{kind}.{how}") for how in ("agnostic", "aware")
                 for kind in ("passkey", "needle")]
        lines.append(" | ".join((
            f"| `{r['recipe']}`", f"{r['nbytes']:,}", f"{r['share']:.0%}", f"{r['perplexity']:.2f}",
            *("-" if x is None else f"{x:.0%}" for x in right))) + " |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--examples", type=int, default=4, help="of passkeys, and of needles")
    parser.add_argument("--ratios", type=float, nargs="*", default=(0.5, 0.25, 0.1))
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--speed", action="store_true", help="time decode steps instead")
    parser.add_argument("--context", type=int, default=TOKENS, help="tokens before timed steps")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each")
    given = parser.parse_intermixed_args()
    if given.print:
        print(table([json.loads(line) for line in given.out.read_text().splitlines()]))
        return
    model, tokenizer = smollm2(torch.float32)
    exact = kvcompile.optimize(model, "full")
    calibration = topics_ids(tokenizer, 2 * 512, 100_000).view(2, 512)
    if given.speed:
        ids = prose(model, tokenizer, given.context, 0)
        held = kvcompile.prefill(exact, ids)
        for recipe in SPEED if given.recipes is RECIPES else given.recipes:
            own = recipe.replace("{ratio}", str(given.ratios[0]))
            with given.out.open("a") as file:
                file.write(json.dumps(step_times(exact, held, own, ids, given.steps, calibration))
                           + "\n")
            gc.collect()
        return
    texts = [Text(exact, tokenizer, keys, seed) for seed in range(given.examples)
             for keys in (1, 4)]
    rows = map(json.loads, given.out.read_text().splitlines()) if given.out.exists() else ()
    done = {r["recipe"] for r in rows if "speed" not in r}

    def note(recipe: str, ratio: float | None) -> None:
        if recipe in done:
            return
        ours = kvcompile.optimize(exact, recipe, compile=False, calibration=calibration,
                                  tokenizer=tokenizer)
        with given.out.open("a") as file:
            file.write(json.dumps(row(ours, recipe, ratio, texts)) + "\n")

    note("full", None)
    for recipe in given.recipes:
        for text in texts:
            text.scores.clear()
        for ratio in given.ratios if "{ratio}" in recipe else (None,):
            note(recipe.replace("{ratio}", str(ratio)), ratio)
            gc.collect()


if __name__ == "__main__":
    main()
