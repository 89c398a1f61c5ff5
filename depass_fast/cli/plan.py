"""``depass-fast plan``: its flags, and what a decomposition will take, from a model's config alone."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import flags, types
from .model import components_of, config_of, device_of, path_of, silence_transformers
from .output import emit

if TYPE_CHECKING:
    from ..adapters import Adapter
    from ..planning.plan import Plan

_DESCRIPTION = """\
Print the FLOP, the memory and the time of a decomposition, before it is run. The model's config is read, its weights
are not: a folder that holds only a config.json will do, and of a GGUF file the header is read.
"""
_EXAMPLES = """\
examples:
  depass-fast plan --model ./llama --length 512 --components tokens
  depass-fast plan --model meta-llama/Llama-2-7b-hf --length 20 --components neurons --layer 0 --dtype bfloat16 --json
  depass-fast plan --model ./llama --length 20 --components neurons --layer all --refine 1000
  depass-fast plan --model ./llama --length 2048 --components ledger --rule half --targets 3
  depass-fast plan --model ./llama --prompt "The capital of France is" --continuation " Paris." --components tokens
  depass-fast plan --model ./llama --length 2048 --components tokens --device cuda --gemm-tflops 790
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description, the flags and the examples."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    flags.add_model(parser)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--length", type=types.lengths, metavar="N", help='tokens of a prompt; "20 35 12" for several')
    length.add_argument("--prompt", type=types.text, metavar="TEXT", help="a text; needs the model's tokenizer")
    read = parser.add_mutually_exclusive_group()
    read.add_argument(
        "--position",
        type=types.positions,
        metavar="P",
        help="what is read, as of `attribute`; or several, such as 3,8,-1. Default: the last",
    )
    read.add_argument("--continuation", type=types.token_text, metavar="TEXT", help="a text that follows --prompt")
    flags.add_components(parser, layer="0", kinds=(*flags.KINDS, "ledger"))
    flags.add_allocation(parser, None, "; of a ledger a linear one. Default: softmax; of a ledger, shapley", "--rule")
    parser.add_argument(
        "--targets", type=int, default=1, metavar="K", help="how many targets a linear rule reads at once. Default: 1"
    )
    flags.add_value_activation(parser)
    flags.add_method(parser)
    flags.add_machine(parser)
    parser.add_argument("--state-dtype", choices=flags.DTYPES, help="dtype of the component state. Default: float32")
    parser.add_argument(
        "--gemm-tflops",
        type=types.rate,
        metavar="X",
        help="the machine's matrix products; --device may then be one that is not here. Default: measured here",
    )
    flags.add_json(parser)
    flags.add_debug(parser)


def run(args: argparse.Namespace) -> None:
    """Print the plan, as text or as JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        silence_transformers()
        plan = _plan(args)
    emit(json.dumps(plan.to_dict(), allow_nan=False) if args.json else plan)


def _plan(args: argparse.Namespace) -> Plan:
    import torch

    from ..chosen_method import choose_method
    from ..methods.plan import check_ledger
    from ..options import Options
    from ..planning.gemm_rate import gemm_rate
    from ..planning.planner import check_length, for_config, make_plan
    from ..planning.shapes import RunShape

    device = torch.device(device_of(args.device, elsewhere=args.gemm_tflops is not None))
    if args.targets < 1:
        raise ValueError(f"--targets: {args.targets} is out of range; it is at least 1.")
    config, is_ledger = config_of(args.model), args.components == "ledger"
    name, rule = ("tokens", "shapley") if is_ledger else (args.components, "softmax")
    if is_ledger and args.layer not in (None, "all"):
        raise ValueError(
            f"--layer: {args.layer!r} cannot be planned by itself: a ledger is of all layers. Leave it out."
        )
    components = components_of(config, name, 0 if args.layer is None or is_ledger else args.layer)
    adapter = for_config(config, getattr(torch, args.dtype) if args.dtype else None)
    options = Options(
        args.allocation or rule,
        memory_budget=args.memory_budget,
        state_dtype=args.state_dtype,
        value_activation=args.value_activation,
    )
    options.check_sharing(adapter)
    method = check_ledger(options, flags.method_of(args)) if is_ledger else flags.method_of(args)
    components.resolve(adapter)  # a layer that does not exist is an error before any method is chosen
    lengths, reads = _lengths(args, adapter)
    carried = [max(of_prompt) for of_prompt in reads]
    if args.gemm_tflops is not None:
        rate, source = args.gemm_tflops * 1e12, "given"
    else:
        rate, source = gemm_rate(device, options.dtypes(adapter.dtype, device)[1])
    shape = RunShape(
        adapter,
        [check_length(length, adapter) for length in lengths],
        components,
        options,
        method=choose_method(method, components, adapter, options, carried, [args.targets * len(one) for one in reads]),
        carried=carried,
        reads=reads,
        gradients=args.targets * max(map(len, reads)),
        is_ledger=is_ledger,
    )
    return make_plan(shape, device=device, gemm_flops=rate, rate_source=source)


def _lengths(args: argparse.Namespace, adapter: Adapter) -> tuple[list[int], list[list[int]]]:
    """Return the number of tokens of every prompt, and how many there are up to each that is read."""
    from ..inputs.continuation import encode_continued
    from ..methods.plan import reads_of_continuations, reads_of_positions

    if args.continuation is None:
        lengths = args.length or [len(_tokenizer(args.model).encode(args.prompt))]
        return lengths, reads_of_positions(args.position, lengths)
    if args.prompt is None:
        raise ValueError("--continuation: it follows a text; give --prompt, or the --length of both.")
    _, whole, own = encode_continued(args.prompt, args.continuation, adapter, _tokenizer(args.model))
    return [len(ids) for ids in whole], reads_of_continuations(whole, own)


def _tokenizer(model: str) -> Any:
    from ..inputs.loading import as_tokenizer

    path = path_of(model)
    try:
        return as_tokenizer(path)
    except ValueError as error:
        where = "this folder" if Path(path).is_dir() else f"{path!r}"
        raise ValueError(f"--prompt: text needs a tokenizer, and {where} has none; give --length.") from error
