"""``depass-fast generate``: a text that the model continues, and what each new token drew on."""

from __future__ import annotations

import argparse

from . import flags, prompts, types
from .model import device_of, engine_of, silence_transformers
from .output import Output, on_stderr, saying_once, show

_DESCRIPTION = "Continue a prompt, and print which earlier tokens gave most to every new one's logit."
_EXAMPLES = """\
examples:
  depass-fast generate --model demo --prompt "When Diane met Grace at the park, Grace handed" --max-new-tokens 4
  depass-fast generate --model ./llama --chat chat.json --max-new-tokens 40 --out shares.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description, the flags and the examples."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    flags.add_model(parser)
    prompts.add_arguments(parser, several=False)
    parser.add_argument(
        "--max-new-tokens", type=types.positive, default=20, metavar="N", help="tokens, chosen greedily. Default: 20"
    )
    how = parser.add_argument_group("how it is computed")
    flags.add_rule(how, "--rule")
    flags.add_value_activation(how)
    flags.add_backend(how)
    flags.add_machine(how)
    out = parser.add_argument_group("output")
    flags.add_json(out)
    flags.add_out(out)
    flags.add_quiet(out)
    flags.add_debug(out)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, before anything is imported."""
    prompts.template_kwargs_of(args)


def run(args: argparse.Namespace) -> None:
    """Generate, decompose, print, and write --out."""
    with on_stderr():
        silence_transformers()
        engine = engine_of(args, device_of(args.device))
        output = Output(args.out, numbered=False)
        # a command lives too short for a compiled forward pass to pay
        settings = getattr(engine.model, "generation_config", None)
        generation = {"disable_compile": True} if hasattr(settings, "disable_compile") else {}
        (item,) = prompts.items_of(args)
        with saying_once():
            result = engine.attribute_generation(item.prompt, max_new_tokens=args.max_new_tokens, generation=generation)
    output.add(result, lambda: show(result, as_json=args.json))
    output.close()
