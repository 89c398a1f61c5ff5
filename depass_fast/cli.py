"""The command ``depass-fast``: demo, attribute, plan, doctor. What is heavy is imported inside the subcommands."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import cli_plan, cli_types

if TYPE_CHECKING:
    from .components import ComponentKind
    from .engine import DePass
    from .result import Attribution

_KINDS = ("tokens", "heads", "modules", "neurons")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_FLAGS = (
    *("prompt", "input-ids", "target", "target-id", "contrast", "model", "layer", "position"),
    *("allocation", "temperature", "backend", "dtype", "memory-budget", "length"),
)
_SUFFIXES = (".safetensors", ".csv")

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
        return _fail(_in_flags(_one_line(error), args))
    return 0


# ------------------------------------------------------------------------------------------------ arguments


class _Parser(argparse.ArgumentParser):
    """Errors are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    def __call__(self, *_: Any) -> NoReturn:
        from . import __version__

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

    attribute = commands.add_parser(
        "attribute",
        help="the share of every token, head, module or neuron in a logit",
        description="Print the share of every component in the logit of a target token.",
        epilog=_ATTRIBUTE_EXAMPLES,
        **shape,
    )
    _attribute_arguments(attribute)
    attribute.set_defaults(run=_attribute)

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
        "--layer", type=cli_types.layer, metavar="L", help="from 0, -1 is the last; or a hook. Default for tokens: 0"
    )
    target = what.add_mutually_exclusive_group()
    target.add_argument("--target", metavar="TEXT", help="one token. Default: the model's own next token")
    target.add_argument("--target-id", type=int, metavar="I")
    contrast = what.add_mutually_exclusive_group()
    contrast.add_argument("--contrast", metavar="TEXT", help="one token: attribute logit(target) - logit(contrast)")
    contrast.add_argument("--contrast-id", type=int, metavar="I")
    what.add_argument("--position", type=int, default=-1, metavar="P", help="where the logit is read. Default: -1")

    how = parser.add_argument_group("how it is computed")
    how.add_argument("--allocation", default="softmax", metavar="RULE", help="softmax, linear, relu, max or taylor")
    how.add_argument("--temperature", type=float, default=0.1, metavar="T", help="of the softmax. Default: 0.1")
    how.add_argument("--no-exclude-special", action="store_true", help="let the first token take part like any other")
    how.add_argument("--backend", default="auto", metavar="B", help="auto, or one that `depass-fast doctor` lists")
    how.add_argument("--dtype", choices=_DTYPES, help="how the model is loaded. Default: as stored")
    how.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... Default: cuda where there is one, else cpu")
    how.add_argument(
        "--memory-budget", type=cli_types.bytes, metavar="BYTES", help="of workspace, e.g. 2G. Default: chosen"
    )

    out = parser.add_argument_group("output")
    out.add_argument("--top", type=cli_types.positive, metavar="K", help="print the K leading components. Default: 10")
    out.add_argument("--json", action="store_true", help="print one JSON object with every score, and nothing else")
    out.add_argument("--out", type=Path, metavar="FILE", help="write every score to FILE.safetensors or FILE.csv")
    out.add_argument("--quiet", action="store_true", help="no progress bar; there is none either where no terminal is")
    out.add_argument("--debug", action="store_true", help="show the traceback of an error")


# ------------------------------------------------------------------------------------------------ attribute


def _attribute(args: argparse.Namespace) -> None:
    # stdout belongs to the result: whatever a library prints on the way goes to stderr.
    with contextlib.redirect_stdout(sys.stderr):
        result = _result(args)
        if args.out is not None:
            (result.save if args.out.suffix == ".safetensors" else result.to_csv)(args.out)
    if args.json:
        print(json.dumps(result.to_dict(), allow_nan=False))
    else:
        _show(result, args.top)
    if args.out is not None:
        print(f"wrote {args.out}", file=sys.stderr)


def _result(args: argparse.Namespace) -> Attribution:
    """The attribution that was asked for; everything that can be checked before loading the model is."""
    _check_out(args.out, _SUFFIXES, "--out")
    prompt = _prompt(args)
    if (args.contrast is not None or args.contrast_id is not None) and args.target is None and args.target_id is None:
        raise ValueError("--contrast: needs a target to be contrasted with; give --target or --target-id.")
    _check_model(args.model)
    _quiet()
    from .allocation import Allocation
    from .backends import resolve

    Allocation(args.allocation, args.temperature)
    resolve(args.backend)
    device = _device(args.device)
    kind = _kind(args)
    engine = _load(args, device)
    return engine.attribute(prompt, kind, _target(args, engine), position=args.position)


def _prompt(args: argparse.Namespace) -> str | list[int]:
    if args.prompt is not None:
        if not args.prompt:
            raise ValueError("--prompt: empty; at least one token is needed.")
        return args.prompt
    ids = args.input_ids.replace(",", " ").split()
    for item in ids:
        if not item.isdecimal():
            raise ValueError(f'--input-ids: {item!r} is not a token id; expected integers such as "1 5 9".')
    if not ids:
        raise ValueError('--input-ids: empty; expected integers such as "1 5 9".')
    return [int(item) for item in ids]


def _check_out(path: Path | None, suffixes: Sequence[str], flag: str) -> None:
    if path is None:
        return
    if path.suffix not in suffixes:
        raise ValueError(f"{flag}: {str(path)!r} must end in {' or '.join(suffixes)}.")
    if path.is_dir() or not path.parent.is_dir():
        wrong = "is a folder" if path.is_dir() else f"lies in a folder that does not exist: {path.parent}"
        raise ValueError(f"{flag}: {str(path)!r} {wrong}.")


def _check_model(model: str) -> None:
    path = Path(model).expanduser()
    if model == "demo" or (path.is_dir() and (path / "config.json").is_file()):
        return
    if path.exists():
        raise ValueError(f"--model: {model!r} is no model folder: it holds no config.json.")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        raise ValueError(f"--model: there is no folder {model!r}. Give a model folder, a hub name, or demo.")


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _device(name: str | None) -> str:
    import torch

    here = ["cpu"]
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        here.append("mps")
    if name is None:
        return "cuda" if "cuda" in here else "cpu"
    if name not in here:
        raise ValueError(f"--device: {name!r} does not exist here; devices: {', '.join(here)}.")
    return name


def _config(model: str) -> Any:
    """The config of a model, and nothing else of it."""
    from transformers import AutoConfig

    path = _path(model)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        where = "" if Path(path).is_dir() else f"{model!r} is no folder here, and the hub did not give it: "
        raise ValueError(f"--model: {where}{_one_line(error)}") from error


def _kind(args: argparse.Namespace) -> ComponentKind:
    """The component kind. The layer is checked against the model's config, before any weight is read."""
    from . import components

    config = _config(args.model)
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    layers = "its layers" if n_layers is None else f"0 to {n_layers - 1}"
    if args.layer is None and args.components != "tokens":
        raise ValueError(f"--layer: {args.components} belong to a layer; choose one of {layers}.")
    kind = getattr(components, args.components.capitalize())(0 if args.layer is None else args.layer)
    if n_layers is not None and not -n_layers <= kind.layer < n_layers:
        raise ValueError(f"--layer: {kind.layer} is out of range; this model has layers {layers}.")
    return kind


def _load(args: argparse.Namespace, device: str) -> DePass:
    from .engine import DePass

    options = {
        "allocation": args.allocation,
        "temperature": args.temperature,
        "exclude_special": not args.no_exclude_special,
        "backend": args.backend,
        "memory_budget": args.memory_budget,
        "progress": not args.quiet,
    }
    if args.model == "demo":
        import torch

        from .demo import load_demo

        model, tokenizer = load_demo(getattr(torch, args.dtype) if args.dtype else None)
        engine = DePass(model.to(device), tokenizer, **options)
    else:
        engine = DePass.from_pretrained(_path(args.model), dtype=args.dtype or "auto", device_map=device, **options)
    if engine.tokenizer is None:
        for flag, ids in (("prompt", "input-ids"), ("target", "target-id"), ("contrast", "contrast-id")):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag}: text needs a tokenizer, and {args.model!r} has none; give --{ids}.")
    return engine


def _path(model: str) -> str:
    from .demo import demo_path

    return str(demo_path() if model == "demo" else Path(model).expanduser())


def _target(args: argparse.Namespace, engine: DePass) -> Any:
    from .prompts import single_token

    target = args.target if args.target is not None else args.target_id
    contrast = args.contrast_id
    if args.contrast is not None:
        contrast = single_token(args.contrast, engine.tokenizer, "contrast")
    elif contrast is not None and not 0 <= contrast < engine.adapter.vocabulary_size:
        size = engine.adapter.vocabulary_size
        raise ValueError(f"--contrast-id: id {contrast} is outside the vocabulary (0 to {size - 1}).")
    return target if contrast is None else (target, contrast)


def _show(result: Attribution, top: int | None) -> None:
    """In colour on a terminal, else as plain text."""
    from rich.console import Console

    from .render import plain, rich_view

    console = Console()
    if console.is_terminal:
        console.print(rich_view(result, top))
    else:
        print(plain(result, top))


# ------------------------------------------------------------------------------------------------ plan, doctor, demo


def _plan(args: argparse.Namespace) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        _check_model(args.model)
        _quiet()
        text = cli_plan.show(args, _path(args.model), _kind(args), _config(args.model), _device(args.device))
    print(text)


def _doctor(args: argparse.Namespace) -> None:
    from . import doctor

    found = doctor.report()
    print(json.dumps(found, indent=2) if args.json else "\n".join(doctor.lines(found)))


def _demo(args: argparse.Namespace) -> None:
    _check_out(args.svg, (".svg",), "--svg")
    _quiet()
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


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory; give a smaller --memory-budget, or a shorter prompt. {text}"
    return text or type(error).__name__


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
