"""The flags that commands share, and the method that some of them name together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import types

if TYPE_CHECKING:
    from ..options import Adjoint, MethodName

KINDS = ("tokens", "heads", "modules", "neurons")
# as in the rooms that know them, which take torch a second to import; a test compares them
_RULES = ("softmax", "linear", "relu", "max", "taylor", "half", "shapley")
LINEAR_RULES = ("shapley", "half", "taylor")
BACKENDS = ("auto", "reference", "torch", "triton")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_model(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--model", required=True, type=types.model, metavar="PATH", help="model folder, GGUF file, hub name, or demo"
    )


def add_components(group: argparse._ActionsContainer, layer: str, kinds: Sequence[str] = KINDS) -> None:
    """--components and --layer. ``layer`` says what the default layer is."""
    group.add_argument("--components", required=True, choices=kinds)
    group.add_argument(
        "--layer",
        type=types.layer,
        metavar="L",
        help=f"counted from 0, -1 is the last; a hook's name; or all. Default: {layer}",
    )


def add_dictionary(group: argparse._ActionsContainer) -> None:
    """--dictionary and --site, of features."""
    group.add_argument(
        "--dictionary",
        type=types.dictionary,
        metavar="FILE",
        help="features: an SAE, FILE.safetensors or FILE.npz with W_enc (D, F), W_dec (F, D), b_enc, b_dec and "
        "threshold, or SAE Lens' folder; a cfg.json beside it says how it encodes, else it is ReLU(x W_enc + b_enc)",
    )
    group.add_argument(
        "--site",
        choices=("resid_pre", "resid_mid", "resid_post"),
        help="features: where in --layer. Default: as the cfg.json or the hook's name in --layer says",
    )


def check_dictionary(args: argparse.Namespace) -> None:
    """Raise ValueError where features have no dictionary, or others have one."""
    if args.components == "features" and args.dictionary is None:
        raise ValueError("--dictionary: features need a file with the weights of a dictionary.")
    for flag in ("dictionary", "site"):
        if args.components != "features" and getattr(args, flag) is not None:
            raise ValueError(f"--{flag}: it belongs to --components features, not to {args.components}.")


def add_method(group: argparse._ActionsContainer) -> None:
    """--method and the numbers of the adjoint sweep."""
    group.add_argument(
        "--method", choices=("exact", "adjoint"), help="default: exact, but for many neurons of all layers"
    )
    group.add_argument("--refine", type=int, metavar="K", help="adjoint: propagate the K largest exactly. Default: 64")
    group.add_argument(
        "--refine-within", choices=("all", "layer"), help="adjoint: the K largest of all layers together, or of each"
    )
    group.add_argument("--sample", type=int, metavar="S", help="adjoint: estimate the error from S others. Default: 64")
    group.add_argument("--seed", type=int, metavar="N", help="adjoint: the seed of the random draws. Default: 0")


def add_allocation(
    group: argparse._ActionsContainer, default: str | None = "softmax", note: str = "", *names: str
) -> None:
    """--allocation, also under other ``names``."""
    text = ", ".join(_RULES) + note
    group.add_argument("--allocation", *names, default=default, choices=_RULES, metavar="RULE", help=text)


def add_value_activation(group: argparse._ActionsContainer) -> None:
    """--value-activation."""
    group.add_argument(
        "--value-activation",
        choices=("frozen", "shared"),
        default="frozen",
        help="the activation behind the values of recurrences (Mamba, Qwen3-Next): frozen, or shared out by the "
        "allocation as an MLP's is. Default: frozen",
    )


def add_rule(group: argparse._ActionsContainer, *names: str) -> None:
    """--allocation, also under other ``names``, --temperature and --no-exclude-special."""
    add_allocation(group, "softmax", "", *names)
    group.add_argument(
        "--temperature", type=types.rate, default=0.1, metavar="T", help="T of the softmax. Default: 0.1"
    )
    group.add_argument("--no-exclude-special", action="store_true", help="let the first token take part like any other")


def add_backend(group: argparse._ActionsContainer) -> None:
    """--backend and --verify."""
    group.add_argument(
        "--backend",
        default="auto",
        choices=BACKENDS,
        metavar="B",
        help="auto, or one that `depass-fast doctor` lists. Default: what DEPASS_FAST_BACKEND says, else auto",
    )
    group.add_argument(
        "--verify", action="store_true", help="recompute a sample of positions with the reference backend"
    )


def add_linear_rule(group: argparse._ActionsContainer, *more: str, **settings: Any) -> None:
    """--rule, one that is linear in the components; ``more`` are other names of the flag."""
    settings = settings or {"choices": LINEAR_RULES}
    text = "how an MLP's activation is shared; docs/rules.md says which rule is for what. Default: shapley"
    group.add_argument("--rule", *more, dest="rule", default="shapley", help=text, **settings)


def add_machine(group: argparse._ActionsContainer) -> None:
    """--dtype, --device and --memory-budget."""
    group.add_argument("--dtype", choices=DTYPES, help="dtype of the model. Default: as stored")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... Default: cuda if there is one, else cpu")
    group.add_argument(
        "--memory-budget",
        type=types.byte_count,
        metavar="BYTES",
        help="bytes of workspace, such as 2G. Default: what there is room for",
    )


def add_json(group: argparse._ActionsContainer, each: str = "one JSON object") -> None:
    group.add_argument("--json", action="store_true", help=f"print {each}, and nothing else")


def add_out(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--out",
        type=types.output_file(".safetensors", ".csv", ".jsonl"),
        metavar="FILE",
        help="write every share to FILE.safetensors or FILE.csv, or all that --json prints to FILE.jsonl",
    )


def add_quiet(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--quiet", action="store_true", help="show no progress bar. Without a terminal there never is one"
    )


def add_debug(group: argparse._ActionsContainer) -> None:
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def check_method(args: argparse.Namespace) -> None:
    """Raise ValueError where a number of the adjoint sweep is given with --method exact."""
    given = _adjoint_numbers(args)
    if args.method == "exact" and given:
        flag = next(iter(given)).replace("within", "refine-within")
        raise ValueError(f"--{flag}: it belongs to --method adjoint; exact scores have nothing to be refined.")


def method_of(args: argparse.Namespace) -> MethodName | Adjoint | None:
    """Return the ``method`` that --method, --refine, --refine-within, --sample and --seed name together.

    --refine, --refine-within, --sample and --seed belong to the adjoint sweep: any of them asks for it.

    Raises:
        ValueError: one of them is out of range.
    """
    given = _adjoint_numbers(args)
    if not given:
        return args.method
    from ..options import Adjoint

    return Adjoint(**given)


def _adjoint_numbers(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of :class:`depass_fast.Adjoint` that flags give."""
    given = {"refine": args.refine, "within": args.refine_within, "sample": args.sample, "seed": args.seed}
    return {name: value for name, value in given.items() if value is not None}
