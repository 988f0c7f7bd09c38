"""What the commands of the command line do; each takes its parsed arguments and prints."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from kvcompile import bench as benchmark
from kvcompile import catalog
from kvcompile.backend import offline
from kvcompile.backend.offline import TARGETS as TARGETS
from kvcompile.bench import GROUPS as GROUPS
from kvcompile.bench.settings import Settings
from kvcompile.errors import KVCompileError
from kvcompile.explain import explain as explained
from kvcompile.measure import demo as demonstration
from kvcompile.measure.baseline import uncompressed
from kvcompile.measure.evaluate import defaults
from kvcompile.measure.evaluate import evaluate as evaluated
from kvcompile.measure.generate import timed
from kvcompile.measure.kernel_table import fallbacks
from kvcompile.measure.kernel_table import kernels as compiled_kernels
from kvcompile.measure.prose import prose
from kvcompile.measure.recall import recall
from kvcompile.measure.roofline import DEVICES as DEVICES
from kvcompile.measure.roofline import Roofline, Step, device
from kvcompile.method import find_method
from kvcompile.optimize import optimize
from kvcompile.program import capture
from kvcompile.recipe import Recipe
from kvcompile.registry import module
from kvcompile.show import progress

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RECIPE = "kivi(bits=4)"
HELD_OUT = 20_000  # where in the prose the text to score starts
PROMPT = "The key-value cache of a language model"


def recipes(args: Namespace) -> None:
    """`kvcompile recipes [NAME]`."""
    if args.name is None:
        _print(args, catalog.as_list(), catalog.table)
    else:
        method = catalog.find(args.name)
        _print(args, catalog.as_dict(method), lambda: catalog.page(method))


def explain(args: Namespace) -> None:
    """`kvcompile explain`: the report, and the graph where asked for."""
    _check(args.recipe)
    on = None if args.device is None else device(args.device)
    if args.plot and on is None:
        raise KVCompileError("--plot needs --device")
    model, _ = _load(args)
    with progress("capturing"):
        report = explained(model, args.recipe)
    program, name = report.program, args.print_graph
    graph = None if name is None else str(program.after(name) if name else program)
    told = {**report.as_dict(), "tokens": args.tokens, "kv_bytes": report.kv_bytes(args.tokens),
            "baseline_kv_bytes": report.baseline_kv_bytes(args.tokens)}
    parts = [report.table(), report.memory(args.tokens)]
    if on is not None:
        predicted = Roofline(Step(program, args.batch), on)
        told["roofline"] = {**predicted.as_dict(), "fallbacks": fallbacks(program)}
        parts += ["", str(predicted), *fallbacks(program)]
        if args.plot:
            full = Roofline(Step(program.lower("full"), args.batch), on)
            predicted.plot(Path(args.plot), full)
    if graph is not None:
        told["graph"] = graph
        parts += ["", graph]
    _print(args, told, lambda: "\n".join(parts))


def run(args: Namespace) -> None:
    """`kvcompile run`: generate, as a stream on a terminal, and say what it took."""
    _check(args.recipe)
    model, tokenizer = _load(args)
    stream = None
    if tokenizer is not None and not args.json and sys.stdout.isatty():
        stream = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if args.demo:
        if tokenizer is None:
            raise KVCompileError(f"--demo needs a model with a tokenizer, which {args.model} lacks")
        result = demonstration.demo(model, tokenizer, args.recipe, streamer=stream,
                                    compile=not args.no_compile)
        _print(args, result.as_dict(), lambda: str(result))
        return
    ids = _prompt(args, model, tokenizer)
    with progress("capturing and checking the model"):
        optimized = optimize(model, args.recipe, compile=not args.no_compile)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.sample}
    if args.sample:
        torch.manual_seed(args.seed)
        options |= {"temperature": args.temperature, "top_p": args.top_p}
    with progress("generating", unless=stream is not None):
        done = timed(optimized, ids, stream, **options)
    text = demonstration.text_of(done.new, tokenizer)
    full = sum(layer.nbytes(done.cached) for layer in uncompressed(model))
    told = {"model": args.model, "recipe": args.recipe, "text": text, **done.as_dict(),
            "baseline_kv_bytes": full}
    figures = [f"KV cache of {done.cached:,} tokens: {done.nbytes:,} bytes (uncompressed {full:,})",
               f"prompt of {done.prompt.numel():,} tokens: {done.prefill:.2f} s"]
    if done.first_step is not None:
        compiles = "" if args.no_compile else " (compiles)"
        figures.append(f"first step: {done.first_step:.2f} s{compiles}")
    if done.ms_per_token is not None:
        figures.append(f"{done.ms_per_token:.1f} ms per token (median)")
    _print(args, told, lambda: "\n".join([*([] if stream else [text]), "", *figures]))


def bench(args: Namespace) -> None:
    """`kvcompile bench`: the rows, in one of three forms."""
    benchmark.check(args.rows)
    for recipe in args.recipes:
        _check(recipe)
    if args.recipes and args.rows not in ([], ["step"]):
        raise KVCompileError("--recipes: only the rows of step are measured for recipes of yours")
    settings = Settings(args.model, args.quick, args.threads or torch.get_num_threads(),
                        args.tokens, tuple(args.recipes))
    result = benchmark.bench(settings, ["step"] if args.recipes else args.rows)
    _print(args, result.as_dict(), result.markdown if args.markdown else lambda: str(result))


def evaluate(args: Namespace) -> None:
    """`kvcompile eval`: the scores of some recipes, of every known method unless given."""
    for recipe in args.recipes:
        _check(recipe)
    model, tokenizer = _load(args)
    if args.needles:
        if tokenizer is None:
            raise KVCompileError(f"--needles: {args.model} has no tokenizer to hide keys with")
        found = recall(model, tokenizer, args.recipes or defaults(RECIPE), tokens=args.context,
                       examples=args.needles, compile=not args.no_compile)
        _print(args, found.as_dict(), lambda: str(found))
        return
    text = prose(model, tokenizer, args.context + args.tokens + 1, HELD_OUT)
    result = evaluated(model, text, args.context, args.recipes or defaults(RECIPE),
                       name=args.model, lenient=not args.recipes, compile=not args.no_compile)
    _print(args, result.as_dict(), lambda: str(result))


def kernels(args: Namespace) -> None:
    """`kvcompile kernels`: what the kernels of a decode step take on each target."""
    _check(args.recipe)
    for target in args.target:
        offline.check(target)
    model, _ = _load(args)
    with progress("compiling"):
        found = compiled_kernels(capture(model, args.recipe), args.target, args.every,
                                 args.geometry and tuple(args.geometry))
    if args.out:
        found.write(Path(args.out))
    _print(args, found.as_dict(), lambda: str(found))


def _print(args: Namespace, data: Any, text: Any) -> None:
    """`data` as JSON where that is asked for, else what `text()` says."""
    print(json.dumps(data, indent=2) if args.json else text())


def _check(recipe: str) -> None:
    """Raise RecipeError for what can be told without the model, before it is loaded."""
    for term in Recipe.parse(recipe).terms:
        find_method(term).bind(term)


def _load(args: Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    with progress(f"loading {args.model}"):
        try:
            model, tokenizer = module("models", "load").load(args.model, DTYPES.get(args.dtype))
        except (ValueError, ModuleNotFoundError) as error:
            raise KVCompileError(str(error)) from error
        if tokenizer is not None:
            model.tokenizer = tokenizer  # for methods that know classes of tokens
        return model, tokenizer


def _prompt(args: Namespace, model: PreTrainedModel,
            tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """Token ids [1, S] of the prompt that the arguments give."""
    text = args.prompt
    if args.prompt_file:
        try:
            text = Path(args.prompt_file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise KVCompileError(f"cannot read {args.prompt_file}: {reason}") from error
    if tokenizer is None:
        ids = _ids("1 2 3 4 5 6 7 8" if text is None else text, args.model, model)
    elif args.chat:
        if not tokenizer.chat_template:
            raise KVCompileError(f"{args.model} has no chat template; leave out --chat")
        told = [{"role": "user", "content": PROMPT if text is None else text}]
        encoded: Any = tokenizer.apply_chat_template(told, add_generation_prompt=True,
                                                     return_dict=True, return_tensors="pt")
        ids = encoded["input_ids"]
    else:
        encoded = tokenizer(PROMPT if text is None else text, return_tensors="pt")
        ids = encoded["input_ids"].long()
    if ids.numel() == 0:
        raise KVCompileError("the prompt is empty")
    return ids


def _ids(text: str, name: str, model: PreTrainedModel) -> Tensor:
    size = model.config.get_text_config().vocab_size
    words = text.split()
    bad = next((w for w in words if not w.isdecimal() or int(w) >= size), None)
    if bad is not None:
        raise KVCompileError(f"{name} has no tokenizer: the prompt is token ids from 0 to "
                             f"{size - 1}, such as '1 2 3', not {bad!r}")
    return torch.tensor([[int(w) for w in words]], dtype=torch.long)
