"""``depass-fast plan``: what a decomposition will take, from a model's config alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import types as cli_types

_DESCRIPTION = """\
FLOP, memory and time of a decomposition, before it is run. Of the model only the config is read, no weights: a folder
with nothing but a config.json will do.
"""
_EXAMPLES = """\
examples:
  depass-fast plan --model ./llama --length 512 --components tokens
  depass-fast plan --model meta-llama/Llama-2-7b-hf --length 20 --components neurons --layer 0 --dtype bfloat16 --json
  depass-fast plan --model ./llama --length 20 --components neurons --layer all --refine 1000
  depass-fast plan --model ./llama --length 2048 --components tokens --device cuda --gemm-tflops 790
"""


def add_arguments(parser: argparse.ArgumentParser, kinds: tuple[str, ...], dtypes: tuple[str, ...]) -> None:
    """The flags."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.add_argument("--model", required=True, metavar="PATH", help="model folder, hub name, or demo")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--length", type=cli_types.lengths, metavar="N", help='tokens of a prompt; "20 35 12" for several'
    )
    length.add_argument("--prompt", metavar="TEXT", help="a text; needs the model's tokenizer")
    parser.add_argument("--components", required=True, choices=kinds)
    parser.add_argument("--layer", type=cli_types.layer, metavar="L", help="as in attribute. Default: 0")
    parser.add_argument("--method", metavar="M", help="exact or adjoint, as in attribute")
    parser.add_argument("--refine", type=int, metavar="K", help="adjoint: propagate the K largest exactly. Default: 64")
    parser.add_argument(
        "--sample", type=int, metavar="S", help="adjoint: estimate the error from S others. Default: 64"
    )
    parser.add_argument("--dtype", choices=dtypes, help="of the model. Default: what its config says")
    parser.add_argument("--state-dtype", choices=dtypes, help="of the component state. Default: float32")
    parser.add_argument(
        "--device",
        metavar="D",
        help="that it would run on; with --gemm-tflops one that is not here, too. Default: the best here",
    )
    parser.add_argument("--memory-budget", type=cli_types.bytes, metavar="BYTES", help="of workspace. Default: chosen")
    parser.add_argument("--gemm-tflops", type=float, metavar="X", help="of the machine. Default: measured on this one")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def show(args: argparse.Namespace, path: str, kind: Any, config: Any, device: str) -> str:
    """The plan as text, or as JSON."""
    import torch

    from ..allocation import Allocation
    from ..options import Options
    from ..planning.gemm_rate import gemm_rate
    from ..planning.planner import check_length, for_config, plan
    from ..request import choose_method

    if args.gemm_tflops is not None and not 0 < args.gemm_tflops < float("inf"):
        raise ValueError(f"--gemm-tflops: {args.gemm_tflops} is out of range; it must be positive.")
    adapter = for_config(config, getattr(torch, args.dtype) if args.dtype else None)
    options = Options(memory_budget=args.memory_budget, state_dtype=args.state_dtype)
    kind.resolve(adapter)  # before a method is chosen for layers that there are not
    sizes = args.length or [_tokens(args.prompt, path)]
    where = torch.device(device)
    if args.gemm_tflops is not None:
        rate, source = args.gemm_tflops * 1e12, "given"
    else:
        rate, source = gemm_rate(where, options.dtypes(adapter.dtype, where)[1])
    method = choose_method(cli_types.method_of(args), kind, adapter, Allocation())
    made = plan(
        adapter,
        [check_length(size, adapter) for size in sizes],
        kind,
        options,
        device=where,
        method=method,
        gemm_flops=rate,
        rate_source=source,
    )
    return json.dumps(made.to_dict(), allow_nan=False) if args.json else str(made)


def _tokens(text: str, path: str) -> int:
    from transformers import AutoTokenizer

    if not text:
        raise ValueError("--prompt: empty; at least one token is needed.")
    try:
        return len(AutoTokenizer.from_pretrained(path).encode(text))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        where = "this folder" if Path(path).is_dir() else f"{path!r}"
        raise ValueError(f"--prompt: text needs a tokenizer, and {where} has none; give --length.") from error
