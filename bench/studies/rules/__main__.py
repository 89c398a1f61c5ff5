"""The rules put to the test: ``python -m bench.studies.rules [--model PATH --questions FILE] [--out FILE.json]``.

For prompts that the model answers rightly, every method ranks all neurons, all heads and all tokens. The lowest and the
highest neurons and heads are masked: their activations, or outputs, are zero at every position, as in the published
evaluation. Tokens are deleted. Without ``--model`` it runs on the demo model and its held-out prompts; ``--questions``
is a JSON list of objects with `prompt` and `answer` (or `attribute`, or `target_token`).

FILE.json.part gets a line per prompt; a run that was cut short goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depass_fast import DePass
from depass_fast.demo import load_demo
from depass_fast.evaluate.erasure import TENTHS, deleted
from depass_fast.evaluate.interventions import PARTS
from depass_fast.evaluate.masking import SHARES, masked

from ...core.cli import command
from ...core.questions import demo_texts
from ...core.results import environment
from .scores import READS, scores_of

ANSWERS = ("answer", "attribute", "target_token")


def answered(engine: DePass, texts: Sequence[tuple[str, str]]) -> Iterator[tuple[str, Tensor, int]]:
    """Yield prompts, their ids (N,) and the answer's first token, where the model's next token is that one."""
    tokenizer: Any = engine.tokenizer
    for text, answer in texts:
        spaced = answer if answer.startswith(" ") or not text[-1].isalnum() else f" {answer}"
        ids = torch.tensor(tokenizer.encode(text))
        target = tokenizer.encode(spaced, add_special_tokens=False)[0]
        with torch.no_grad():
            if int(engine.model(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1].argmax()) == target:
                yield text, ids, target


def measure(engine: DePass, text: str, ids: Tensor, target: int, seed: int) -> dict:
    """Return what one prompt says of every method."""
    began = time.perf_counter()
    scores = scores_of(engine, ids, target, seed)
    tokenizer: Any = engine.tokenizer
    found: dict = {"prompt": text, "tokens": len(ids), "scored_s": time.perf_counter() - began}
    for kind in PARTS:
        found[kind] = {
            ", ".join([*method, ranking]): ends
            for method, of_method in getattr(scores, kind).items()
            for ranking, ends in masked(engine, ids, target, kind, of_method, both=method[1] in READS).items()
        }
    special = set(tokenizer.all_special_ids)
    found["deleted"] = {
        ", ".join(method): values for method, values in deleted(engine, ids, target, special, scores.tokens).items()
    }
    return found | {"seconds": time.perf_counter() - began}


def averaged(prompts: Sequence[dict]) -> dict:
    """Return the means over prompts: accuracies per share, probabilities per measure."""
    masking = {
        kind: {
            ranking: {
                end: torch.tensor([[int(digit) for digit in one[kind][ranking][end]] for one in prompts])
                .double()
                .mean(0)
                .tolist()
                for end in SHARES[kind]
            }
            for ranking in prompts[0][kind]
        }
        for kind in PARTS
    }
    deletion = {
        method: {name: sum(one["deleted"][method][name] for one in prompts) / len(prompts) for name in values}
        for method, values in prompts[0]["deleted"].items()
    }
    return {"masked": masking, "deleted": deletion}


def show(found: dict) -> None:
    """Print the means over the shares."""
    for kind, rankings in found["masked"].items():
        for ranking, ends in rankings.items():
            figures = "  ".join(f"{end} {sum(values) / len(values):.2f}" for end, values in ends.items())
            print(f"{kind:8} {ranking:42} {figures}")
    for method, values in found["deleted"].items():
        print(f"tokens   {method:42} " + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))


def engine_and_texts(options: Any) -> tuple[DePass, list[tuple[str, str]]]:
    """Return the model, and prompts with their answers."""
    if options.model is None:
        texts = demo_texts(60)  # indirect objects, then facts: in turns here
        return DePass(*load_demo(), progress=False), [
            pair for both in zip(texts[:30], texts[30:], strict=True) for pair in both
        ]
    engine = DePass.from_pretrained(options.model, dtype=torch.float32, progress=False)
    lines = json.loads(options.questions.read_text())
    return engine, [(one["prompt"], next(one[name] for name in ANSWERS if name in one)) for one in lines]


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.studies.rules", __doc__)
    parser.add_argument("--model", help="a folder, or a hub name (default: the demo model)")
    parser.add_argument("--questions", type=Path, help="with --model: a JSON list of prompts with their answers")
    parser.add_argument("--name", help="the model's name in the file")
    parser.add_argument("--prompts", type=int, help="prompts that are answered rightly (default: 24; 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="two prompts: seconds on the demo model")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.questions is None):
        parser.error("--model and --questions go together")
    count = options.prompts or (2 if options.quick else 24)
    part = None if options.out is None else options.out.with_name(options.out.name + ".part")
    done = [json.loads(line) for line in part.read_text().splitlines()] if part and part.exists() else []
    engine, texts = engine_and_texts(options)
    known = {one["prompt"] for one in done}
    for text, ids, target in answered(engine, texts):
        if len(done) >= count:
            break
        if text in known:
            continue
        done.append(measure(engine, text, ids, target, seed=len(done)))
        print(f"{len(done)} of {count}: {text!r}, {done[-1]['seconds']:.1f} s", flush=True)
        if part:
            with part.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    found = averaged(done)
    show(found)
    if options.out and part:
        name = options.name or ("demo" if options.model is None else Path(options.model).name)
        facts = {"model": name, "prompts": len(done), "shares": SHARES, "deleted_shares": TENTHS, **found}
        content = {"benchmark": "rules", "environment": environment(), **facts}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
        part.unlink()


if __name__ == "__main__":
    main()
