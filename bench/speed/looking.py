"""The price of attention's own book: ``python -m bench.speed.looking [--out FILE.json] [--tiny]``.

Explaining all heads of a layer of Llama-2-7B's widths, tokens: the step alone beside carrying the same components
through that layer's attention, with the memory that it takes beside the state; and the whole call on a trace beside the
decomposition that it starts from. Then a ledger with its second book beside one without, and the credit of tokens, head
by head, beside their exact attribution. Candidates take turns, after a first call of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from depass_fast import DePass, LogProb, Tokens
from depass_fast.evaluate.peak import give_back, measurable, measured
from depass_fast.looking.explain import explain
from depass_fast.looking.freeze import freeze_sides
from depass_fast.looking.rows import PromptRows
from depass_fast.looking.turned import turns_of
from depass_fast.propagation.layer import through_attention
from depass_fast.state.state import ComponentState

from ..core.cli import command, writable
from ..core.models import SHAPES, Shape, build_model, random_prompt
from ..core.results import write_results
from ..core.timing import interleaved


@dataclass
class LookingTime:
    """Medians in seconds of a call and of what stands beside it, and the median ratio of a turn.

    ``peak_bytes`` is the memory of the call beside what it was given, None where that was not measured.
    """

    workload: str
    model: str
    tokens: int
    seconds: float
    beside: str
    beside_s: float
    ratio: float
    peak_bytes: int | None
    runs: int

    def as_dict(self) -> dict:
        return asdict(self)


def one_layer(shape: Shape, tokens: int, runs: int) -> list[LookingTime]:
    """Explain all heads of the second layer of two, whose MLPs are narrow: they are not looked at."""
    dp = DePass(build_model(replace(shape, layers=2, intermediate=64, vocabulary=1024)), progress=False)
    ids = random_prompt(replace(shape, vocabulary=1024), tokens)
    trace = dp.trace(ids)
    state = dp.decompose(trace, Tokens(), end=1, allocation="shapley")
    record, adapter = trace.layers[1].attention, dp.adapter
    sides = freeze_sides(adapter, 1, record, trace.span(0), turns_of(adapter, [ids], [1])[0][1], torch.float32)
    rows = PromptRows.of(state, 0, False, False)
    heads, keys = list(range(shape.heads)), list(range(tokens))
    run = dp.options.updated({"allocation": "shapley"}).build(adapter)

    def explained() -> object:
        return explain(rows, sides, record, trace.span(0), heads, tokens - 1, keys)

    def carried() -> object:
        copy = ComponentState(state.rows.clone(), state.layout, 1)
        run.backend.begin(adapter, trace, 1, 2)
        return through_attention(copy, adapter.layer(1), trace.layers[1], run)

    explained()  # buffers of the libraries are there before the peak is taken
    give_back()
    peak = measured(explained) if measurable() else None
    step, call = f"{shape.heads} heads of a layer", f"explain_attention, {shape.heads} heads"

    def called() -> object:
        return dp.explain_attention(trace, Tokens(), 1, allocation="shapley")

    def decomposed() -> object:
        return dp.decompose(trace, Tokens(), end=1, allocation="shapley")

    return [
        _row(step, shape, tokens, explained, "its attention, carried", carried, runs, peak),
        _row(call, shape, tokens, called, "decompose to the layer", decomposed, runs),
    ]


def books(shape: Shape, tokens: int, runs: int) -> LookingTime:
    """Take a ledger of both books, and one of one."""
    dp, ids = DePass(build_model(shape), progress=False), random_prompt(shape, tokens)
    trace, target = dp.trace(ids), LogProb(1)
    both, one = (lambda a=attention: dp.ledger(trace, target, attention=a) for attention in (True, False))
    return _row("ledger(attention=True)", shape, tokens, both, "ledger()", one, runs)


def credit(shape: Shape, tokens: int, runs: int) -> LookingTime:
    """Take the credit of tokens, head by head, and their exact attribution under the same rule."""
    dp, ids = DePass(build_model(shape), progress=False, allocation="shapley"), random_prompt(shape, tokens)
    trace = dp.trace(ids)

    def credited() -> object:
        return dp.attention_credit(trace, Tokens(), 1)

    def attributed() -> object:
        return dp.attribute(trace, Tokens(), 1, method="exact")

    return _row("attention_credit, tokens", shape, tokens, credited, "attribute, tokens", attributed, runs)


def _row(
    workload: str,
    shape: Shape,
    tokens: int,
    call: Callable[[], object],
    beside: str,
    other: Callable[[], object],
    runs: int,
    peak: int | None = None,
) -> LookingTime:
    found: dict[str, Any] = interleaved({"call": call, "beside": other}, runs)
    seconds, rest = (float(np.median(found[name])) for name in ("call", "beside"))
    ratio = float(np.median(found["call"] / found["beside"]))
    return LookingTime(workload, shape.name, tokens, seconds, beside, rest, ratio, peak, runs)


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.speed.looking", __doc__)
    parser.add_argument("--out", type=writable, help="write the rows to this JSON file")
    parser.add_argument("--tiny", "--quick", action="store_true", help="a tiny model, in seconds")
    parser.add_argument("--runs", type=int, help="timed turns (default: 3; 1 with --tiny)")
    options = parser.parse_args(arguments)
    runs = options.runs or (1 if options.tiny else 3)
    wide, small = (SHAPES[name] for name in (("llama-tiny",) * 2 if options.tiny else ("llama-2-7b", "smollm2-135m")))
    with torch.no_grad():
        rows = one_layer(wide, 16 if options.tiny else 512, runs)
        rows += [make(small, 16 if options.tiny else 64, runs) for make in (books, credit)]
    for row in rows:
        peak = "" if row.peak_bytes is None else f", {row.peak_bytes / 2**20:.0f} MiB"
        print(
            f"{row.model:14} {row.workload:30} {row.seconds:8.3f} s; {row.beside}: {row.beside_s:.3f} s, "
            f"{row.ratio:.2f}×{peak}"
        )
    if options.out:
        write_results(options.out, "looking", rows, "cpu")


if __name__ == "__main__":
    main()
