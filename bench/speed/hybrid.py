"""The price of recurrences: ``python -m bench.speed.hybrid [--out FILE.json] [--tiny] [--runs N]``.

Tokens are carried through a stack like Qwen3-Next's, three layers of gated delta rule and one of gated attention, and
through a Llama of the same widths, by the torch backend. Rates count the rows' products alone, the same of both models:
2·D·(v + o) + 4·D·I FLOP per row and layer and the up projection's part of none. The goal is 0.8 of Llama's rate. The
planner's peak stands beside the measured one. Candidates take turns, after a first call of each.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from depass_fast import DePass, Tokens
from depass_fast.evaluate.peak import give_back, measurable, measured

from ..core.cli import command, writable
from ..core.models import family_model
from ..core.results import write_results
from ..core.timing import interleaved

GOAL = 0.8


@dataclass
class HybridTime:
    """Medians in seconds and rates in FLOP/s of both stacks; ``share`` is the hybrid's rate relative to Llama's.

    ``planned_bytes`` and ``peak_bytes`` are those of the hybrid, with its trace; None where it was not measured.
    """

    model: str
    tokens: int
    seconds: float
    llama_s: float
    rate: float
    llama_rate: float
    share: float
    planned_bytes: int
    peak_bytes: int | None
    runs: int

    def as_dict(self) -> dict:
        return asdict(self)


def compare(width: int, intermediate: int, heads: int, tokens: int, runs: int) -> HybridTime:
    """Carry all tokens of a prompt from layer 0 to the logit through both stacks of four layers."""
    head, common = 128 if width >= 512 else 16, {"hidden_size": width, "intermediate_size": intermediate}
    common |= {"num_hidden_layers": 4, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": head}
    common |= {"max_position_embeddings": 4096}
    delta: dict[str, Any] = {"linear_num_key_heads": heads // 2, "linear_num_value_heads": heads}
    delta |= {"linear_key_head_dim": head, "linear_value_head_dim": head}
    delta["layer_types"] = ["linear_attention"] * 3 + ["full_attention"]
    models = {"hybrid": family_model("qwen3_5_text", **common, **delta), "llama": family_model("llama", **common)}
    ids = torch.randint(64, (tokens,), generator=torch.Generator().manual_seed(0))
    calls = {}
    for name, model in models.items():
        dp = DePass(model, progress=False)
        trace = dp.trace(ids)
        calls[name] = lambda dp=dp, trace=trace: dp.attribute(trace, Tokens(), 1, backend="torch", method="exact")
    dp = DePass(models["hybrid"], progress=False)
    plan = dp.plan(ids, Tokens(), backend="torch", measure=False).of()
    peak = None
    if measurable():
        dp.attribute(ids, Tokens(), 1, backend="torch")
        give_back()
        peak = measured(lambda: dp.attribute(ids, Tokens(), 1, backend="torch"))
    found = interleaved(calls, runs)
    seconds, llama = (float(np.median(found[name])) for name in ("hybrid", "llama"))
    rows = tokens * (tokens + 1) / 2
    flop = 4 * rows * (2 * width * 2 * heads * head + 4 * width * intermediate)
    share = float(np.median(found["llama"] / found["hybrid"]))
    name = f"D={width}, I={intermediate}, {heads} heads of {head}"
    return HybridTime(name, tokens, seconds, llama, flop / seconds, flop / llama, share, plan.peak_bytes, peak, runs)


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.speed.hybrid", __doc__)
    parser.add_argument("--out", type=writable, help="write the rows to this JSON file")
    parser.add_argument("--tiny", "--quick", action="store_true", help="tiny models, in seconds")
    parser.add_argument("--runs", type=int, help="timed turns (default: 5; 1 with --tiny)")
    options = parser.parse_args(arguments)
    runs = options.runs or (1 if options.tiny else 5)
    cases = [(64, 128, 4, 16)] if options.tiny else [(1024, 3072, 16, 128)]
    with torch.no_grad():
        rows = [compare(*case, runs) for case in cases]
    for row in rows:
        print(f"{row.model}, {row.tokens} tokens: {row.seconds:.3f} s, Llama {row.llama_s:.3f} s")
        print(f"{row.rate / 1e9:.0f} and {row.llama_rate / 1e9:.0f} GFLOP/s: {row.share:.2f} (goal {GOAL})")
        if row.peak_bytes:
            off = row.planned_bytes / row.peak_bytes - 1
            print(f"peak {row.peak_bytes >> 20} MiB, planned {row.planned_bytes >> 20} MiB ({off:+.0%})")
    if options.out:
        write_results(options.out, "hybrid", rows)


if __name__ == "__main__":
    main()
