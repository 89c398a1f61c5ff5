"""The command ``depass-fast``: demo, attribute, plan, doctor. What is heavy is imported inside the subcommands."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from . import plan as cli_plan
from . import types as cli_types
from .attribute import attribute, check_model, check_out, config_of, device_of, kind_of, one_line, path_of, quiet

_KINDS = ("tokens", "heads", "modules", "neurons")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_FLAGS = (
    *("prompt", "input-ids", "target", "target-id", "contrast", "model", "layer", "position"),
    *(
        "allocation",
        "temperature",
        "backend",
        "dtype",
        "memory-budget",
        "method",
        "refine",
        "refine-within",
        "sample",
        "seed",
        "verify",
    ),
    "length",
)

_DESCRIPTION = """\
Exact attributions for Hugging Face causal language models: how much of a logit comes from every input token,
attention head, module or MLP neuron. The shares sum to the logit.
"""
_EXAMPLES = """\
examples:
  depass-fast demo
  depass-fast attribute --model demo --prompt "Nyria Morstam speaks" --components tokens
  depass-fast doctor
"""
_ATTRIBUTE_EXAMPLES = """\
examples:
  depass-fast attribute --model demo --prompt "Nyria Morstam speaks" --components tokens
  depass-fast attribute --model ./llama --prompt "The capital of France is" --components heads --layer 12 \\
      --target " Paris" --contrast " Rome"
  depass-fast attribute --model ./llama --input-ids "1 450 7483" --components neurons --layer 3 --out n3.safetensors
  depass-fast attribute --model ./llama --prompt "The capital of France is" --components neurons --layer all \\
      --method adjoint --refine 200 --sample 200
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after an error of the user's, 130 after Ctrl-C."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    except ValueError as error:
        return _fail(str(error))
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if getattr(args, "debug", False) or not _is_users(error):
            raise
        return _fail(_in_flags(one_line(error), args))
    return 0


# ------------------------------------------------------------------------------------------------ arguments


class _Parser(argparse.ArgumentParser):
    """Errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> NoReturn:
        from .. import __version__

        print(f"depass-fast {__version__}")
        raise SystemExit(0)


def _parser() -> argparse.ArgumentParser:
    shape = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser("depass-fast", description=_DESCRIPTION, epilog=_EXAMPLES, **shape)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="{demo,attribute,plan,doctor}"
    )

    demo = commands.add_parser(
        "demo",
        help="a tour on the small model that comes along; no arguments, a few seconds",
        description="Attribute the answers of the small language model that comes with the library.",
        epilog="example:\n  depass-fast demo",
        **shape,
    )
    demo.add_argument("--svg", type=Path, metavar="FILE", help="also write the output as a picture")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser(
        "doctor",
        help="versions, devices, and which backends can run here and why not",
        description="Report versions, devices, and which backends can run here and why not.",
        epilog="example:\n  depass-fast doctor --json",
        **shape,
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)

    shares = commands.add_parser(
        "attribute",
        help="the share of every token, head, module or neuron in a logit",
        description="Print the share of every component in the logit of a target token.",
        epilog=_ATTRIBUTE_EXAMPLES,
        **shape,
    )
    _attribute_arguments(shares)
    shares.set_defaults(run=attribute)

    plan = commands.add_parser("plan", help="FLOP, memory and time of a decomposition, before it is run", **shape)
    cli_plan.add_arguments(plan, _KINDS, _DTYPES)
    plan.set_defaults(run=_plan)
    return parser


def _attribute_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is attributed")
    what.add_argument("--model", required=True, metavar="PATH", help="model folder, hub name, or demo")
    prompt = what.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--input-ids", metavar="IDS", help='token ids as they are, e.g. "1 5 9"; nothing is added')
    what.add_argument("--components", required=True, choices=_KINDS)
    what.add_argument(
        "--layer",
        type=cli_types.layer,
        metavar="L",
        help="from 0, -1 is the last; a hook; or all. Default for tokens: 0",
    )
    target = what.add_mutually_exclusive_group()
    target.add_argument("--target", metavar="TEXT", help="one token. Default: the model's own next token")
    target.add_argument("--target-id", type=int, metavar="I")
    contrast = what.add_mutually_exclusive_group()
    contrast.add_argument("--contrast", metavar="TEXT", help="one token: attribute logit(target) - logit(contrast)")
    contrast.add_argument("--contrast-id", type=int, metavar="I")
    what.add_argument("--position", type=int, default=-1, metavar="P", help="where the logit is read. Default: -1")

    how = parser.add_argument_group("how it is computed")
    how.add_argument(
        "--method", metavar="M", help="exact or adjoint. Default: exact, but for many neurons of all layers"
    )
    how.add_argument("--refine", type=int, metavar="K", help="adjoint: propagate the K largest exactly. Default: 64")
    how.add_argument("--refine-within", metavar="W", help="adjoint: K of all layers together, or of each: layer")
    how.add_argument("--sample", type=int, metavar="S", help="adjoint: estimate the error from S others. Default: 64")
    how.add_argument("--seed", type=int, metavar="N", help="adjoint: of what is drawn at random. Default: 0")
    how.add_argument("--allocation", default="softmax", metavar="RULE", help="softmax, linear, relu, max or taylor")
    how.add_argument("--temperature", type=float, default=0.1, metavar="T", help="of the softmax. Default: 0.1")
    how.add_argument("--no-exclude-special", action="store_true", help="let the first token take part like any other")
    how.add_argument(
        "--backend",
        default="auto",
        metavar="B",
        help="auto, or one that `depass-fast doctor` lists. Default: what DEPASS_FAST_BACKEND says, else auto",
    )
    how.add_argument("--dtype", choices=_DTYPES, help="how the model is loaded. Default: as stored")
    how.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... Default: cuda where there is one, else cpu")
    how.add_argument(
        "--memory-budget", type=cli_types.bytes, metavar="BYTES", help="of workspace, e.g. 2G. Default: chosen"
    )

    how.add_argument("--verify", action="store_true", help="recompute a sample of positions with the reference backend")

    out = parser.add_argument_group("output")
    out.add_argument("--top", type=cli_types.positive, metavar="K", help="print the K leading components. Default: 10")
    out.add_argument("--json", action="store_true", help="print one JSON object with every score, and nothing else")
    out.add_argument("--out", type=Path, metavar="FILE", help="write every score to FILE.safetensors or FILE.csv")
    out.add_argument("--quiet", action="store_true", help="no progress bar; there is none either where no terminal is")
    out.add_argument("--debug", action="store_true", help="show the traceback of an error")


# ------------------------------------------------------------------------------------------------ plan, doctor, demo


def _plan(args: argparse.Namespace) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        check_model(args.model)
        quiet()
        args.layer = 0 if args.layer is None else args.layer
        device = device_of(args.device, elsewhere=args.gemm_tflops is not None)
        text = cli_plan.show(args, path_of(args.model), kind_of(args), config_of(args.model), device)
    print(text)


def _doctor(args: argparse.Namespace) -> None:
    from . import doctor

    found = doctor.report()
    print(json.dumps(found, indent=2) if args.json else "\n".join(doctor.lines(found)))


def _demo(args: argparse.Namespace) -> None:
    check_out(args.svg, (".svg",), "--svg")
    quiet()
    import torch
    from rich.console import Console

    from .tour import tour

    console = Console(record=args.svg is not None, width=100 if args.svg is not None else None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only loses by waiting for threads, much on a busy machine
    try:
        tour(console)
    finally:
        torch.set_num_threads(threads)
    if args.svg is not None:
        console.save_svg(str(args.svg), title="depass-fast demo")
        print(f"wrote {args.svg}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ errors


def _is_users(error: Exception) -> bool:
    """What a user can mend: bad input, a missing or broken file, a missing package, too little memory. Else: a bug."""
    if isinstance(error, (ValueError, TypeError, FloatingPointError, OSError, ImportError, MemoryError)):
        return True
    return type(error).__name__ in ("OutOfMemoryError", "SafetensorError")


def _in_flags(message: str, args: argparse.Namespace) -> str:
    """The library names its arguments; the user of the command line gave flags."""
    name, colon, rest = message.partition(":")
    flag = name.replace("_", "-")
    if colon and flag in ("prompt", "target") and getattr(args, flag, None) is None:
        flag = {"prompt": "input-ids", "target": "target-id"}[flag]
    return f"--{flag}:{rest}" if colon and flag in _FLAGS else message


def _fail(message: str) -> int:
    print(f"depass-fast: error: {message}", file=sys.stderr)
    return 2
