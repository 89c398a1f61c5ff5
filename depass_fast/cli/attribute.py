"""``depass-fast attribute``: its flags, its work, and what it prints. Heavy modules are imported inside functions."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import flags, types
from .model import components_of, config_of, device_of, path_of, silence_transformers

if TYPE_CHECKING:
    from ..engine import DePass
    from ..results.attribution import Attribution
    from ..results.layered import LayeredAttribution

_DESCRIPTION = "Print the share of every component in the logit of a target token."
_EXAMPLES = """\
examples:
  depass-fast attribute --model demo --prompt "Nyria Morstam speaks" --components tokens
  depass-fast attribute --model ./llama --prompt "The capital of France is" --components heads --layer 12 \\
      --target " Paris" --contrast " Rome"
  depass-fast attribute --model ./llama --input-ids "1 450 7483" --components neurons --layer 3 --out n3.safetensors
  depass-fast attribute --model ./llama --prompt "The capital of France is" --components neurons --layer all \\
      --method adjoint --refine 200 --sample 200
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description, the flags and the examples. A flag for text and its twin for ids share an argument."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    what = parser.add_argument_group("what is attributed")
    flags.add_model(what)
    prompt = what.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", type=types.text, metavar="TEXT")
    prompt.add_argument(
        "--input-ids",
        dest="prompt",
        type=types.token_ids,
        metavar="IDS",
        help='token ids as they are, such as "1 5 9"; nothing is added',
    )
    flags.add_components(what, layer="0 for tokens; none for others")
    target = what.add_mutually_exclusive_group()
    target.add_argument("--target", metavar="TEXT", help="one token. Default: the model's own next token")
    target.add_argument("--target-id", dest="target", type=int, metavar="I")
    contrast = what.add_mutually_exclusive_group()
    contrast.add_argument("--contrast", metavar="TEXT", help="one token: attribute logit(target) - logit(contrast)")
    contrast.add_argument("--contrast-id", dest="contrast", type=int, metavar="I")
    what.add_argument("--position", type=int, default=-1, metavar="P", help="where the logit is read. Default: -1")

    how = parser.add_argument_group("how it is computed")
    flags.add_method(how)
    how.add_argument("--allocation", default="softmax", metavar="RULE", help="softmax, linear, relu, max or taylor")
    how.add_argument("--temperature", type=float, default=0.1, metavar="T", help="T of the softmax. Default: 0.1")
    how.add_argument("--no-exclude-special", action="store_true", help="let the first token take part like any other")
    how.add_argument(
        "--backend",
        default="auto",
        metavar="B",
        help="auto, or one that `depass-fast doctor` lists. Default: what DEPASS_FAST_BACKEND says, else auto",
    )
    flags.add_machine(how)
    how.add_argument("--verify", action="store_true", help="recompute a sample of positions with the reference backend")

    out = parser.add_argument_group("output")
    out.add_argument("--top", type=types.positive, metavar="K", help="print the K leading components. Default: 10")
    flags.add_json(out)
    out.add_argument(
        "--out",
        type=types.output_file(".safetensors", ".csv"),
        metavar="FILE",
        help="write every score to FILE.safetensors or FILE.csv",
    )
    out.add_argument("--quiet", action="store_true", help="show no progress bar. Without a terminal there never is one")
    flags.add_debug(out)


def run(args: argparse.Namespace) -> None:
    """Attribute, write --out, and print the result. Whatever else a library prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr), _log_on_stderr():
        result = _attribution(args)
        if args.out is not None:
            (result.save if args.out.suffix == ".safetensors" else result.to_csv)(args.out)
    if args.json:
        print(json.dumps(result.to_dict(), allow_nan=False))
    else:
        _show(result, args.top)
    if args.out is not None:
        print(f"wrote {args.out}", file=sys.stderr)


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """Print what the library logs (the backend that was chosen, and why) on stderr."""
    logger, handler = logging.getLogger("depass_fast"), logging.StreamHandler(sys.stderr)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _attribution(args: argparse.Namespace) -> Attribution | LayeredAttribution:
    """The attribution that was asked for. All that can be checked without the weights is checked before they load."""
    silence_transformers()
    import torch

    from ..allocation import Allocation
    from ..backends import choose_backend
    from ..options import Options

    Allocation(args.allocation, args.temperature)
    device = device_of(args.device)
    where, dtype = torch.device(device), getattr(torch, args.dtype) if args.dtype else None
    choose_backend(args.backend, where, dtype and Options().dtypes(dtype, where)[1])
    components = components_of(config_of(args.model), args.components, args.layer)
    method = flags.method_of(args)
    engine = _engine(args, device)

    from ..results.estimate import ApproximationWarning
    from ..results.verification import VerificationWarning

    with warnings.catch_warnings():  # the printed result says the same
        warnings.simplefilter("ignore", ApproximationWarning)
        warnings.simplefilter("ignore", VerificationWarning)
        return engine.attribute(
            args.prompt, components, args.target, contrast=args.contrast, position=args.position, method=method
        )


def _engine(args: argparse.Namespace, device: str) -> DePass:
    from ..engine import DePass

    options = {
        "allocation": args.allocation,
        "temperature": args.temperature,
        "exclude_special": not args.no_exclude_special,
        "backend": args.backend,
        "memory_budget": args.memory_budget,
        "progress": not args.quiet,
        "verify": args.verify,
    }
    if args.model == "demo":
        import torch

        from ..demo import load_demo

        model, tokenizer = load_demo(getattr(torch, args.dtype) if args.dtype else None)
        engine = DePass(torch.nn.Module.to(model, torch.device(device)), tokenizer, **options)
    else:
        engine = DePass.from_pretrained(path_of(args.model), dtype=args.dtype or "auto", device_map=device, **options)
    if engine.tokenizer is None:
        for flag, ids in (("prompt", "input-ids"), ("target", "target-id"), ("contrast", "contrast-id")):
            if isinstance(getattr(args, flag), str):
                raise ValueError(f"--{flag}: text needs a tokenizer, and {args.model!r} has none; give --{ids}.")
    return engine


def _show(result: Attribution | LayeredAttribution, top: int | None) -> None:
    """Print a result: in colour on a terminal, else as plain text."""
    from rich.console import Console

    from ..results.render import plain, rich_view

    console = Console()
    if console.is_terminal:
        console.print(rich_view(result, top))
    else:
        print(plain(result, top))
