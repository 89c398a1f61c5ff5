"""``depass-fast sweep``: attributions of a file of prompts into a folder. Heavy modules come inside functions."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import flags, prompts, types
from .model import components_of, config_of, device_of, engine_of, features_of, silence_transformers
from .output import emit, note, on_stderr

if TYPE_CHECKING:
    from ..components.base import ComponentKind
    from ..inputs.prompt_set import PromptSet
    from ..sweep.dealing import Share
    from ..sweep.opened import Sweep
    from ..sweep.run import Writing

FAILED = 3  # the exit status where prompts failed
_DESCRIPTION = """\
Attribute every prompt of a file into a folder of Parquet files. What is finished stays, whatever happens: the same
command again does the rest. A prompt that fails is a row of errors.parquet, and the exit status is 3,
but for processes of torchrun or srun, which would end each other.
"""
_EXAMPLES = """\
examples:
  depass-fast sweep --model ./llama --data prompts.jsonl --components heads --layers all --allocation shapley \\
      --target-field answer --out runs/heads
  torchrun --nproc-per-node 8 -m depass_fast sweep --model ./llama --data prompts.jsonl --components tokens --out runs/t
  depass-fast sweep --model ./llama --data prompts.jsonl --components tokens --out runs/t --engine ray --workers 4
  depass-fast collect runs/heads
"""
_FIELDS = ("prompt", "target", "contrast", "position", "id")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the description, the flags and the examples."""
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    _add_data(parser.add_argument_group("model and data"))
    _add_components(parser.add_argument_group("what is attributed"))
    how = parser.add_argument_group("how it is computed")
    flags.add_method(how)
    flags.add_rule(how, "--rule")
    flags.add_value_activation(how)
    how.add_argument("--backend", default="auto", choices=flags.BACKENDS, metavar="B", help="default: auto")
    flags.add_machine(how)
    how.add_argument(
        "--batch-size", type=types.positive, metavar="B", help="prompts computed together. Default: as many as pay"
    )
    how.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: this process, and those that torchrun or srun starts beside it; ray: workers of a Ray cluster",
    )
    how.add_argument("--workers", type=types.positive, metavar="W", help="ray: how many. Default: one per GPU, or one")
    how.add_argument("--cores-per-worker", type=types.positive, metavar="C", help="ray: CPU cores that each takes")
    _add_output(parser.add_argument_group("output"))
    # what the other commands have flags for
    parser.set_defaults(verify=False, chat=None, chat_template_kwargs=None, prompts=None, prompt=None, input_ids=None)


def _add_data(group: argparse._ActionsContainer) -> None:
    flags.add_model(group)
    group.add_argument(
        "--data",
        required=True,
        metavar="DATA",
        help="FILE.jsonl, .json, .csv, .tsv or .parquet; a folder of Parquet files or of `datasets`; or a data set's "
        "name on the hub",
    )
    group.add_argument("--split", metavar="NAME", help="the split of a data set. Default: train")
    for name, default in zip(_FIELDS, ("prompt, messages or input_ids", *_FIELDS[1:]), strict=True):
        group.add_argument(f"--{name}-field", metavar="F", help=f"the field of the {name}. Default: {default}")
    group.add_argument(
        "--target-space", action="store_true", help="put a space before targets that have none and follow a word"
    )
    prompts.add_template_kwargs(group, dest="template_kwargs")


def _add_components(group: argparse._ActionsContainer) -> None:
    group.add_argument("--components", required=True, choices=(*flags.KINDS, "features"))
    group.add_argument(
        "--layers",
        "--layer",
        dest="layer",
        type=types.layers,
        metavar="L",
        help="a layer, several such as 0,3,7, or all; counted from 0. Default: 0 for tokens; none for others",
    )
    flags.add_dictionary(group)
    group.add_argument("--target-kind", choices=("logit", "log-prob"), default="logit", help="default: logit")


def _add_output(group: argparse._ActionsContainer) -> None:
    group.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the run is, or shall be")
    group.add_argument(
        "--top", type=types.positive, metavar="K", help="rows for the K leading components, and the sum of the others"
    )
    group.add_argument("--dense", action="store_true", help="write all scores as safetensors, too")
    group.add_argument(
        "--shard-prompts", type=types.positive, metavar="N", help="prompts of a file. Default: 1024; with ray 64"
    )
    group.add_argument(
        "--shard-seconds", type=types.rate, default=30.0, metavar="S", help="a file's seconds of work. Default: 30"
    )
    group.add_argument("--strict", action="store_true", help="stop at the first prompt that fails")
    group.add_argument("--retry-failed", action="store_true", help="try prompts again that failed in an earlier start")
    flags.add_json(group, "a JSON object at the end")
    flags.add_quiet(group)
    flags.add_debug(group)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, before anything is imported."""
    flags.check_dictionary(args)
    flags.check_method(args)
    if args.target_kind == "log-prob" and args.contrast_field is not None:
        raise ValueError(
            "--target-kind: the difference of two log-probabilities is that of the logits; leave it or "
            "--contrast-field out."
        )
    if args.engine == "local":
        for name in ("workers", "cores_per_worker"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')}: it belongs to --engine ray; processes of one machine are started by "
                    "torchrun, or by srun."
                )


def run(args: argparse.Namespace) -> int:
    """Do what is left of a sweep, and say how it ended. Returns the exit status."""
    with on_stderr(), _stopping_like_ctrl_c():
        silence_transformers()
        data = _data(args)
        done = _over_ray(args, data) if args.engine == "ray" else _here(args, data)
    about = {
        "folder": str(done.folder),
        "prompts": done.n_prompts,
        "done": done.n_done,
        "failed": done.n_failed,
        "complete": done.is_complete,
        "reason": done.commonest_reason(),
    }
    emit(json.dumps(about) if args.json else _told(about))
    # torchrun and srun end all processes of a job in which one has another status
    return FAILED if about["failed"] and not _is_one_of_several() else 0


def _is_one_of_several() -> bool:
    from ..sweep.dealing import Share

    return Share.of_environment().world > 1


def _told(about: dict[str, Any]) -> str:
    lines = [f"{about['folder']}: {about['done']:,} of {about['prompts']:,} prompts done"]
    if about["failed"]:
        lines.append(f"{about['failed']:,} of them failed; the reasons are in {about['folder']}/errors.parquet")
        lines.append(f"most often: {about['reason']}")
    if not about["complete"]:
        lines.append("the others are dealt to other processes, or were left by one that stopped")
    return "\n".join([*lines, f"depass-fast collect {about['folder']}"])


def _data(args: argparse.Namespace) -> PromptSet:
    from ..inputs.prompt_set import PromptSet

    fields = {name: getattr(args, f"{name}_field") for name in _FIELDS}
    data = PromptSet.read(args.data, split=args.split, target_space=args.target_space, **fields)
    data.checked()  # before a model is loaded
    return data


def _writing(args: argparse.Namespace, shard_prompts: int) -> Writing:
    from ..sweep.run import Writing

    return Writing(
        top=args.top,
        dense=args.dense,
        shard_prompts=args.shard_prompts or shard_prompts,
        shard_seconds=args.shard_seconds,
        most=args.batch_size,
        strict=args.strict,
        retry_failed=args.retry_failed,
    )


def _here(args: argparse.Namespace, data: PromptSet) -> Sweep:
    """Sweep in this process, which may be one of several."""
    from ..sweep.asked import Asked
    from ..sweep.dealing import Share
    from ..sweep.opened import Sweep
    from ..sweep.run import run as run_share

    share = Share.of_environment()
    device = _device(args, share)
    components = _components(args, device)
    engine = engine_of(args, device)
    settings = engine.options.updated({"chat_template_kwargs": args.template_kwargs})
    asked = Asked(engine.adapter, engine.tokenizer, settings, components, flags.method_of(args), args.target_kind)
    report = (lambda line: None) if args.quiet else _lines(share)
    run_share(asked, data, args.out, _writing(args, 1024), share, report)
    return Sweep.open(args.out)


def _lines(share: Share) -> Any:
    """Return what prints a line per shard, unless a bar is shown on a terminal."""
    import sys

    if sys.stderr is not None and sys.stderr.isatty():
        return lambda line: None
    front = "" if share.world == 1 else f"rank {share.rank}: "
    return lambda line: note(front + line)


def _over_ray(args: argparse.Namespace, data: PromptSet) -> Sweep:
    """Sweep by the workers of a Ray cluster; this process loads no weights."""
    from ..sweep.opened import Sweep
    from ..sweep.over_ray import Pool, run_over_ray

    given = {name: value for name, value in vars(args).items() if not callable(value)}
    pool = Pool(args.workers, args.cores_per_worker, args.device)
    asking = {"method": flags.method_of(args), "target_kind": args.target_kind}
    report = (lambda line: None) if args.quiet else note
    components = _components(args, "cpu")
    run_over_ray(_Load(given), data, args.out, components, _writing(args, 64), pool, report, **asking)
    return Sweep.open(args.out)


class _Load:
    """Makes the engine of a call on a worker, from the values of its flags."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given

    def __call__(self) -> Any:
        args = argparse.Namespace(**self.given)
        silence_transformers()
        engine = engine_of(args, device_of(args.device))
        engine.options = engine.options.updated({"chat_template_kwargs": args.template_kwargs, "progress": False})
        return engine


def _components(args: argparse.Namespace, device: str) -> ComponentKind:
    config = config_of(args.model)
    if args.components == "features":
        components, how = features_of(config, args.dictionary, args.layer, args.site, device)
        note(how)
        return components
    return components_of(config, args.components, args.layer)


def _device(args: argparse.Namespace, share: Share) -> str:
    """Return the device of a process: its own GPU of several, or its share of the cores.

    Raises:
        ValueError: there are more processes on this machine than GPUs, or than cores.
    """
    import torch

    if share.world == 1:
        return device_of(args.device)
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if share.local_rank >= count:
            raise ValueError(f"--device: {share.local_world} processes on a machine with {count} GPUs; start {count}.")
        return device_of(f"cuda:{share.local_rank}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if kind == "cpu" and share.local_world > cores:
        raise ValueError(f"--device: {share.local_world} processes on a machine with {cores} cores; start {cores}.")
    torch.set_num_threads(max(1, cores // share.local_world))
    return device_of(kind)


@contextlib.contextmanager
def _stopping_like_ctrl_c() -> Iterator[None]:
    """Take SIGTERM, by which a scheduler announces the end, like Ctrl-C: what is finished is written."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
