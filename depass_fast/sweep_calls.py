"""The calls of :class:`depass_fast.DePass` for many prompts: a generator, and a run into a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .calls import Calls
from .components.base import ComponentKind
from .inputs.prompt_set import PromptSet
from .options import Adjoint, MethodName, OptionValues
from .sweep.asked import Asked
from .sweep.dealing import Share
from .sweep.opened import Sweep
from .sweep.outcomes import outcomes
from .sweep.run import Writing, run

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SweepCalls(Calls):
    """Attributions of many prompts: batches by planned cost, failures in their place, memory that stays flat."""

    def sweep(
        self,
        prompts: Iterable[Any] | PromptSet,
        components: ComponentKind,
        *,
        targets: Sequence[Any] | None = None,
        contrasts: Sequence[Any] | None = None,
        positions: Sequence[Any] | None = None,
        target_kind: Literal["logit", "log-prob"] = "logit",
        method: MethodName | Adjoint | None = None,
        batch_size: int | None = None,
        strict: bool = False,
        **options: Unpack[OptionValues],
    ) -> Iterator[Any]:
        """Yield the result of every prompt, in their order, as :meth:`depass_fast.DePass.attribute` returns it for one.

        Prompts are computed in jagged batches of similar cost, some ahead of what is yielded. A batch changes no result
        beyond rounding.

        Args:
            prompts: an iterable of prompts, of mappings with the fields of :meth:`depass_fast.PromptSet.read`, a
                DataFrame with these columns, or a PromptSet. An iterator is gone through as results are asked for.
            targets, contrasts, positions: one for each prompt, as of :meth:`depass_fast.DePass.attribute`.
            target_kind: "log-prob" reads the log-probability of the targets.
            batch_size: the most prompts that are computed together. Default: as many as pay, and as memory allows.
            strict: raise the error of a prompt that cannot be attributed. By default a false
                :class:`depass_fast.FailedPrompt` with the reason takes the place of its result.
            components, method, options: as of :meth:`depass_fast.DePass.attribute`.

        Raises:
            ValueError, TypeError: bad input that all prompts share, at once. With ``strict`` a prompt's error, when its
                result is asked for.
        """
        asked = Asked(self.adapter, self.tokenizer, self.options.updated(options), components, method, target_kind)
        asked.check()
        limit = Writing(most=batch_size)
        given = PromptSet.once(prompts, targets=targets, contrasts=contrasts, positions=positions)
        found = outcomes(asked, given, most=limit.most, strict=strict, ordered=True)
        return (outcome.value for batch in found for outcome in batch)

    def sweep_to(
        self,
        folder: str | Path,
        prompts: Iterable[Any] | PromptSet,
        components: ComponentKind,
        *,
        targets: Sequence[Any] | None = None,
        contrasts: Sequence[Any] | None = None,
        positions: Sequence[Any] | None = None,
        ids: Sequence[str] | None = None,
        target_kind: Literal["logit", "log-prob"] = "logit",
        method: MethodName | Adjoint | None = None,
        top: int | None = None,
        dense: bool = False,
        batch_size: int | None = None,
        shard_prompts: int = 1024,
        shard_seconds: float = 30.0,
        strict: bool = False,
        retry_failed: bool = False,
        report: Callable[[str], None] | None = None,
        **options: Unpack[OptionValues],
    ) -> Sweep:
        """Attribute all prompts into a folder of Parquet files, and return it opened. A second call goes on.

        A prompt that cannot be attributed is a row of its errors. Processes that torchrun or srun started share the
        prompts among them, by their ids; nothing else is needed.

        Args:
            folder: is made if need be. One that holds this very run is gone on with.
            ids: the names of the prompts in the table; by default the field "id", or their numbers from 0.
            top: rows for so many components of every result, by magnitude, and one for the sum of the others. Default:
                all.
            dense: write all scores as safetensors, too (:meth:`depass_fast.Sweep.dense`).
            shard_prompts, shard_seconds: a file is finished when it holds so many prompts or so many seconds of work,
                which is what a killed process loses, with the batch that it is at.
            strict: stop at the first prompt that cannot be attributed.
            retry_failed: try prompts again that failed in an earlier start; by default these are done.
            report: gets a line for every finished file.
            others: as of :meth:`depass_fast.DePass.sweep`.

        Raises:
            ValueError, TypeError: bad input, before any work: an id that is there twice, prompts of several forms, a
                folder of another run (the message says what differs).
            OSError: the disk is full. All that is finished is kept.
            ImportError: pyarrow is not installed.
        """
        settings = self.options.updated(options)
        asked = Asked(self.adapter, self.tokenizer, settings, components, method, target_kind)
        given = PromptSet.of(prompts, targets=targets, contrasts=contrasts, positions=positions, ids=ids)
        writing = Writing(top, dense, shard_prompts, shard_seconds, batch_size, strict, retry_failed)
        path = Path(folder).expanduser()
        run(asked, given, path, writing, Share.of_environment(), report or (lambda line: None))
        return Sweep.open(path)
