"""The command line: run | explain | recipes | bench | eval | kernels; errors are one line."""

import argparse
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from transformers.utils import logging as transformers_logging

from kvcompile import commands
from kvcompile.errors import KVCompileError

RECIPE = commands.RECIPE
MODEL = "hub id, folder, smollm2 (default) or tiny-<arch>, e.g. tiny-llama"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    command = "kvcompile"
    try:
        args = _parser().parse_args(argv)
        command = f"kvcompile {args.command}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, about itself
            args.function(args)
            sys.stdout.flush()
        return 0
    except _Mistake as error:
        print(error, file=sys.stderr)
        return 2
    except KVCompileError as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader had enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        raise _Mistake(f"{self.prog}: {message}")


class _Mistake(Exception):
    """Arguments that cannot be read."""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _share(text: str) -> float:
    if _above_zero(text) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 1")
    return float(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="kvcompile", description="A compiler for the KV cache of causal LMs.")
    add = parser.add_subparsers(dest="command", required=True,
                                metavar="run | explain | recipes | bench | eval | kernels")

    run = add.add_parser("run", help="generate text with a compressed cache")
    _model(run)
    run.add_argument("--demo", action="store_true",
                     help="a long text: bytes, perplexity and speed beside Hugging Face")
    prompt = run.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="token ids for a model without tokenizer")
    prompt.add_argument("--prompt-file", metavar="FILE")
    run.add_argument("--chat", action="store_true", help="put the prompt into the chat template")
    run.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    run.add_argument("--sample", action="store_true", help="sample instead of the likeliest token")
    run.add_argument("--temperature", type=_above_zero, default=1.0, help="with --sample")
    run.add_argument("--top-p", type=_share, default=1.0, help="with --sample")
    run.add_argument("--seed", type=int, default=0, help="with --sample")
    run.add_argument("--no-compile", action="store_true", help="run the decode graph eagerly")
    run.set_defaults(function=commands.run)

    explain = add.add_parser("explain", help="what a recipe makes of a model, layer by layer")
    _model(explain)
    explain.add_argument("--tokens", type=_positive, default=4096, metavar="N",
                         help="length for which KV bytes are given (4096)")
    explain.add_argument("--print-graph", nargs="?", const="", metavar="PASS",
                         help="print the graph, as it is after PASS or after all of them")
    explain.add_argument("--device", metavar="D",
                         help=f"predict a decode step on {', '.join(commands.DEVICES)}")
    explain.add_argument("--batch", type=_positive, default=1, metavar="N", help="with --device")
    explain.add_argument("--plot", metavar="FILE",
                         help="with --device: draw time against context, and that of full")
    explain.set_defaults(function=commands.explain)

    recipes = add.add_parser("recipes", help="the methods that recipes are made of")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="one method in full")
    recipes.add_argument("--json", action="store_true")
    recipes.set_defaults(function=commands.recipes)

    bench = add.add_parser("bench", help="speed beside the peers and the targets, in one table")
    bench.add_argument("--model", default="smollm2", metavar="M", help=MODEL)
    bench.add_argument("--quick", action="store_true", help="what takes two minutes")
    bench.add_argument("--rows", nargs="+", default=[], metavar="GROUP",
                       help=f"of {', '.join(commands.GROUPS)} (all)")
    bench.add_argument("--threads", type=_positive, metavar="N", help="as torch has them")
    bench.add_argument("--tokens", type=_positive, metavar="N",
                       help="tokens in the cache, instead of several lengths")
    bench.add_argument("--recipes", nargs="+", default=[], metavar="R",
                       help="the decode step of these, beside the first (no other rows)")
    form = bench.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object, with all samples")
    form.add_argument("--markdown", action="store_true", help="the table for docs/performance.md")
    bench.set_defaults(function=commands.bench)

    scores = add.add_parser("eval", help="what recipes cost in quality and save in memory")
    scores.add_argument("--model", default="smollm2", metavar="M", help=MODEL)
    scores.add_argument("--recipes", nargs="+", default=[], metavar="R",
                        help=f"every known method, and {RECIPE}, unless given")
    scores.add_argument("--context", type=_positive, default=2048, metavar="N",
                        help="tokens of the prompt (2048)")
    scores.add_argument("--tokens", type=_positive, default=128, metavar="N",
                        help="tokens scored after it (128)")
    scores.add_argument("--needles", type=_positive, default=0, metavar="N",
                        help="ask for N keys hidden in the context instead, of each kind")
    scores.add_argument("--dtype", choices=sorted(commands.DTYPES))
    scores.add_argument("--no-compile", action="store_true", help="run the decode graph eagerly")
    scores.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    scores.set_defaults(function=commands.evaluate)
    kernels = add.add_parser("kernels", help="the GPU kernels of a recipe, compiled without a GPU")
    _model(kernels)
    kernels.add_argument("--target", nargs="+", default=["cuda:90"], metavar="T",
                         help=f"of {', '.join(commands.TARGETS)} (cuda:90)")
    kernels.add_argument("--every", action="store_true",
                         help="the kernels of every method, alone and with --recipe")
    kernels.add_argument("--geometry", nargs=3, type=_positive, metavar=("HQ", "HKV", "D"),
                         help="query heads, kv heads and head dimension in place of the model's")
    kernels.add_argument("--out", metavar="FOLDER", help="write sources, PTX and cubins there")
    kernels.set_defaults(function=commands.kernels)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", metavar="M", help=MODEL)
    parser.add_argument("--recipe", default=RECIPE, metavar="R",
                        help=f'such as "{RECIPE}" (default); see kvcompile recipes')
    parser.add_argument("--dtype", choices=sorted(commands.DTYPES))
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


if __name__ == "__main__":
    sys.exit(main())
