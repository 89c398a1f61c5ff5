"""A sweep over a Ray cluster: Ray Data hands units of prompts to a pool of actors, each with a model of its own.

A unit is a shard. An actor that dies loses the unit that it was at, which Ray gives to another one; a unit that was
written and is done again replaces itself, as a shard's name is the hash of its prompts.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..components.base import ComponentKind
from ..inputs.prompt_set import Checked, Item, PromptSet
from ..runtime.extras import needed
from .asked import Asked
from .dense import Dense
from .folder import ERRORS, SCORES, at_work, check_room, forget_failures, prompts_of, remove_unfinished, write_shard
from .manifest import claim, manifest_of
from .outcomes import Outcome, outcomes
from .rows import Rows
from .run import Counts, Writing, take_in


@dataclass(frozen=True)
class Pool:
    """The workers of a sweep: how many, and what each takes.

    workers: None for one per GPU of the cluster, or one where there is none. cores: of a CPU that each takes; None: an
    even share of the cluster's. device: "cpu" takes no GPU; by default each takes one where the cluster has any.
    """

    workers: int | None = None
    cores: int | None = None
    device: str | None = None


def run_over_ray(
    load: Callable[[], Any],
    prompts: PromptSet,
    folder: Path,
    components: ComponentKind,
    writing: Writing,
    pool: Pool,
    report: Callable[[str], None] = lambda line: None,
    **asking: Any,
) -> Counts:
    """Attribute all prompts that the folder's shards do not name yet by a pool of Ray's actors.

    ``load`` makes a :class:`depass_fast.DePass` on a worker. Shards hold ``writing.shard_prompts`` prompts each;
    ``asking`` are ``method`` and ``target_kind`` as of :meth:`depass_fast.DePass.sweep_to`, and so are the errors. The
    cluster is the one that Ray is connected to, or that RAY_ADDRESS names, or a new one on this machine.

    Raises:
        ImportError: Ray is not installed.
        ValueError: there are more workers than the cluster has GPUs or cores for.
    """
    needed("ray", "engine='ray'", "ray")
    import ray
    import ray.data

    checked = prompts.checked()
    check_room(folder)
    ray.init(ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
    workers, each = _resources(ray.cluster_resources(), pool)
    with at_work(folder, 0, 1) as lock:
        remove_unfinished(folder, lock, 1)
        if writing.retry_failed:
            forget_failures(folder, 1)
        finished, failed = prompts_of(folder, SCORES), prompts_of(folder, ERRORS)
        counts = Counts(checked.count, len(finished), len(failed))
        missing = (item for item in prompts if item.id not in finished and item.id not in failed)
        # where nothing is left, a unit of none: a worker sees whether it is the same run
        units = [{"unit": pickle.dumps(unit)} for unit in _units(missing, writing.shard_prompts)] or [{"unit": _NONE}]
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        given = {
            "load": load,
            "folder": str(folder.resolve()),
            "components": components,
            "checked": checked,
            "name": prompts.name,
            "writing": writing,
            "asking": asking,
            "threads": each.get("num_cpus"),
        }
        done = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
            _Worker,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(units))),
            fn_constructor_kwargs={"given": pickle.dumps(given)},
            **each,
        )
        _follow(done.iter_rows(), counts, report)
    return counts


def _units(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while unit := list(islice(items, size)):
        yield unit


def _resources(cluster: dict[str, float], pool: Pool) -> tuple[int, dict[str, Any]]:
    """Return the number of workers, and what each takes of the cluster.

    Raises:
        ValueError: the cluster has less.
    """
    gpus, cores = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 1))
    on_gpus = gpus > 0 and pool.device != "cpu"
    workers = pool.workers or (gpus if on_gpus else 1)
    each = pool.cores or max(1, cores // workers)
    if on_gpus and workers > gpus:
        raise ValueError(f"workers: {workers} are asked for, and the cluster has {gpus} GPUs; take {gpus}.")
    if workers * each > cores:
        most = max(1, cores // (pool.cores or 1))
        raise ValueError(f"workers: {workers} take {workers * each} cores, and the cluster has {cores}; take {most}.")
    return workers, {"num_cpus": each, **({"num_gpus": 1} if on_gpus else {})}


def _follow(rows: Iterator[dict[str, Any]], counts: Counts, report: Callable[[str], None]) -> None:
    """Count the units as they are done. An error of a worker's is raised here."""
    for row in rows:
        if row["error"]:
            raise pickle.loads(row["error"])  # of our own worker
        if not row["finished"] + row["failed"]:
            continue
        counts.add(int(row["finished"]), int(row["failed"]))
        counts.shards += 1
        report(f"shard {counts.shards}: {int(row['finished'] + row['failed']):,} prompts; {counts}")


_NONE = pickle.dumps([])


class _Worker:
    """An actor: the model is loaded once, and units are attributed one after the other."""

    def __init__(self, given: bytes) -> None:
        self.error: Exception | None = None
        try:
            self._start(**pickle.loads(given))
        except Exception as error:  # raised in the driver: Ray would start the actor again and again
            self.error = error

    def _start(
        self,
        load: Callable[[], Any],
        folder: str,
        components: ComponentKind,
        checked: Checked,
        name: str,
        writing: Writing,
        asking: dict[str, Any],
        threads: int,
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        engine = load()
        self.folder, self.writing = Path(folder), writing
        self.asked = Asked(engine.adapter, engine.tokenizer, engine.options, components, **asking)
        self.asked.check()
        claim(self.folder, manifest_of(self.asked, checked, name, writing.top, writing.dense))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Attribute a unit and write its shard; returns what became of it."""
        finished = failed = 0
        if self.error is None:
            try:
                found = self._attributed(pickle.loads(batch["unit"][0]))
                failed = sum(outcome.failure is not None for outcome in found)
                finished = len(found) - failed
            except Exception as error:
                self.error = error
        said = b"" if self.error is None else _portable(self.error)
        return {"finished": [finished], "failed": [failed], "error": [said], "process": [os.getpid()]}

    def _attributed(self, unit: list[Item]) -> list[Outcome]:
        rows, dense, held = Rows(self.writing.top), Dense() if self.writing.dense else None, []
        for found in outcomes(self.asked, unit, most=self.writing.most, strict=self.writing.strict):
            for outcome in found:
                take_in(outcome, held, rows, dense)
        if held:
            write_shard(self.folder, f"ray-{os.getpid()}", held, rows, dense)
        return held


def _portable(error: Exception) -> bytes:
    """Return an error as bytes; one that cannot be copied as its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return pickle.dumps(error)
