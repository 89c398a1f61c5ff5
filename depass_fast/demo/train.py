"""Generate the text, train the demo model, print its figures and write it: ``python -m depass_fast.demo.train``.

The same seed, machine and number of threads give the same model. The schedule counts steps; ``--minutes`` only
shortens the first phase on a machine that is too slow to finish its steps in that time. This command wrote the shipped
model in 21 minutes on two busy cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import demo_path, load_demo
from .evaluate import evaluate, targets_met
from .lexicon import LANGUAGES
from .text import MIX, Example, claim, training_examples, world
from .tokenizer import BOS, EOS, PAD, build_tokenizer, save_tokenizer

STEPS = 3000
BATCH_TOKENS, REHEARSAL_TOKENS = 3072, 1024


class ClaimStage(NamedTuple):
    """A stage of the second phase: claims with one of the first ``answers`` answers, in ``languages``."""

    steps: int
    answers: int
    languages: tuple[str, ...]


# Comparing two words among a few is learnt in fifty steps; among all of them at once it is not learnt in thousands.
CLAIM_STAGES = (
    ClaimStage(130, 4, ("en",)),
    ClaimStage(60, 8, ("en",)),
    ClaimStage(100, 99, ("en",)),
    ClaimStage(160, 99, LANGUAGES),
)
CLAIM_BATCH, CLAIM_LR = 96, 1e-3
CHUNK = 16384  # examples that are sorted by length together, so that a batch holds little padding
PEAK_LR, FINAL_LR, WARMUP, WEIGHT_DECAY = 3e-3, 3e-5, 150, 0.05

# Grouped-query attention with two key/value heads, and output embeddings of its own, as in larger Llamas.
ARCHITECTURE = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of config.json, written by hand so that transformers 4 and 5 read the same model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **ARCHITECTURE,
        "attention_dropout": 0.0,
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "pad_token_id": tokenizer.token_to_id(PAD),
        # Transformers 4 reads the first, transformers 5 the second.
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "torch_dtype": "float32",
        "use_cache": True,
    }


Row = tuple[list[int], list[float]]  # the ids of a text and the loss weight of each


def batches(
    tokenizer: Tokenizer, seed: int, tokens: int = BATCH_TOKENS, mix: Mapping[str, int] = MIX
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end: ids ``[B, T]``, each row from ``<s>`` on, and the tokens' loss weights ``[B, T]``."""
    pad = tokenizer.token_to_id(PAD)
    stream = training_examples(seed, EOS, mix)
    rng = random.Random(f"batches-{seed}")
    while True:
        examples = list(itertools.islice(stream, CHUNK))
        rows = _encoded(examples, tokenizer)
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[Row]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row[0]) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = torch.tensor([i + [pad] * (width - len(i)) for i, _ in group])
            weights = torch.tensor([w + [0.0] * (width - len(w)) for _, w in group])
            yield ids, weights


def _encoded(examples: Sequence[Example], tokenizer: Tokenizer) -> list[Row]:
    """Encode every example, with ``<s>`` in front, which has no loss weight."""
    bos = tokenizer.token_to_id(BOS)
    # Pieces end at word boundaries, where the byte-level splitter cuts anyway: encoding them one by one gives the
    # tokens of the whole text.
    texts = [text for example in examples for text, _ in example]
    pieces = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    rows = []
    for example in examples:
        ids, weights = [bos], [0.0]
        for _, weight in example:
            piece = next(pieces).ids
            ids += piece
            weights += [weight] * len(piece)
        rows.append((ids, weights))
    return rows


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of the next-token loss. Logits are computed only for tokens with a weight."""
    # Rows are padded on the right, so causal attention alone keeps the padding out.
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
    target, weight = ids[:, 1:], weights[:, 1:]
    kept = weight > 0
    loss = F.cross_entropy(model.lm_head(hidden[kept]), target[kept], reduction="none")
    return (loss * weight[kept]).sum() / weight[kept].sum()


def learning_rate(done: float, step: int) -> float:
    """Return the rate of a linear warm-up and a cosine down to FINAL_LR; ``done`` is the share of the training done."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return (FINAL_LR + (PEAK_LR - FINAL_LR) * cosine) * min(1.0, (step + 1) / WARMUP)


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, steps: int, minutes: float, seed: int) -> None:
    """Train in place with AdamW, without weight decay for vectors (the norms' weights)."""
    model.train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.98),
        fused=True,
    )
    start, running = time.monotonic(), None
    for step, (ids, weights) in enumerate(batches(tokenizer, seed)):
        elapsed = (time.monotonic() - start) / 60
        done = max(step / steps, elapsed / minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, step)
        loss = weighted_loss(model, ids, weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step:5d}/{steps}  {elapsed:5.1f} min  loss {running:.3f}", flush=True)
    model.eval()


def claim_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, entities: Sequence[str], stage: ClaimStage
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw claims, each with the right recall and a full stop: ids ``[B, T]``, last positions and verdicts ``[B]``."""
    items = [claim(rng, entities, stage.answers, stage.languages) for _ in range(CLAIM_BATCH)]
    texts = [f"{i.text}{i.recall}{world().answer(i.entity, i.relation, i.language)}." for i in items]
    rows = tokenizer(texts)["input_ids"]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    verdicts = tokenizer([i.verdict for i in items], add_special_tokens=False)["input_ids"]
    return ids, torch.tensor([len(row) - 1 for row in rows]), torch.tensor(verdicts)[:, 0]


def train_claims(model: LlamaForCausalLM, tokenizer: Tokenizer, fast: PreTrainedTokenizerFast, seed: int) -> None:
    """Train the second phase: to tell, after the recall, if the claim was true. All else is rehearsed meanwhile."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=CLAIM_LR, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    rehearsal = batches(tokenizer, seed + 1, REHEARSAL_TOKENS, {**MIX, "claim": 0})
    rng, held = random.Random(seed), tuple(world().verdict_heldout)
    shown = tuple(e for e in world().entities if e not in world().verdict_heldout)
    total, done = sum(stage.steps for stage in CLAIM_STAGES), 0
    for stage in CLAIM_STAGES:
        for _ in range(stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = CLAIM_LR * min(1.0, (total - done) / 200 + 0.03)
            ids, stop, verdict = claim_batch(rng, fast, shown, stage)
            batch = torch.arange(len(ids))
            hidden = model.model(ids, use_cache=False).last_hidden_state
            loss = F.cross_entropy(model.lm_head(hidden[batch, stop]), verdict)
            loss = loss + 0.5 * F.cross_entropy(model.lm_head(hidden[batch, stop - 2]), ids[batch, stop - 1])
            if done >= CLAIM_STAGES[0].steps:
                loss = loss + weighted_loss(model, *next(rehearsal))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            if done % 50 == 0:
                with torch.no_grad():
                    ids, stop, verdict = claim_batch(rng, fast, held, stage)
                    hidden = model.model(ids, use_cache=False).last_hidden_state[batch, stop]
                right = (model.lm_head(hidden).argmax(-1) == verdict).float().mean().item()
                print(f"claims {done:4d}/{total}  held-out verdicts {right:.3f}", flush=True)
    model.eval()


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights, configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = model_config(tokenizer)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, folder, int(ARCHITECTURE["max_position_embeddings"]))


def main() -> None:
    """Train the demo model and write it with its figures."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=demo_path(), help="folder to write (default: the shipped one)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=24.0, help="upper limit of the first phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.monotonic()
    tokenizer = build_tokenizer()
    config = {k: v for k, v in model_config(tokenizer).items() if k not in ("architectures", "model_type")}
    model = LlamaForCausalLM(LlamaConfig(**config))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, vocabulary {tokenizer.get_vocab_size()}", flush=True)
    train(model, tokenizer, args.steps, args.minutes, args.seed)
    # The text tokenizer as users load it; the weights are those in memory.
    save(model, tokenizer, args.out)
    train_claims(model, tokenizer, load_demo(path=args.out)[1], args.seed)
    trained = time.monotonic() - start
    save(model, tokenizer, args.out)

    # Evaluate what was written, as a user would load it.
    steps = [args.steps, sum(stage.steps for stage in CLAIM_STAGES)]
    figures: dict[str, Any] = {"parameters": parameters, "steps": steps, "seed": args.seed}
    figures |= evaluate(*load_demo(path=args.out))
    figures["targets_met"] = targets_met(figures)
    text = json.dumps(figures, indent=2)
    (args.out / "figures.json").write_text(text + "\n", encoding="utf-8")
    size = sum(f.stat().st_size for f in args.out.iterdir()) / 1e6
    print(text)
    print(f"trained in {trained / 60:.1f} min, {(time.monotonic() - start) / 60:.1f} min in all, {size:.2f} MB")


if __name__ == "__main__":
    main()
