"""The options that say how a decomposition is computed: their defaults and their check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

import torch

from .adapters import Adapter
from .allocation import Allocation, Rule
from .backends import Backend, Choice, ShardBackend, StreamBackend, TorchBackend, choose_backend, make_backend, resolve
from .inputs.chat import check_template_kwargs
from .propagation.run import Run
from .propagation.verify import Verifier
from .runtime.brief import brief_repr
from .runtime.dtypes import parse_dtype, refuse_autocast, widest
from .runtime.numbers import as_index
from .runtime.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

RuleName: TypeAlias = Literal["softmax", "linear", "relu", "max", "taylor", "half", "shapley"]
LinearRuleName: TypeAlias = Literal["taylor", "half", "shapley"]
BackendName: TypeAlias = Literal["auto", "reference", "torch", "triton"]
MethodName: TypeAlias = Literal["exact", "adjoint"]


@dataclass(frozen=True)
class Options:
    """Options are given to :class:`depass_fast.DePass` as defaults, and to a single call as overrides.

    allocation: "softmax", "linear", "relu", "max" (:mod:`depass_fast.allocation`), "taylor", "half", "shapley"
        (:mod:`depass_fast.linear_rules`), or a callable.
    temperature: T of the softmax, positive.
    exclude_special: True keeps the first token (the attention sink, whatever its id) out of the allocation at every
        position but its own; a list of positions names the tokens to keep out; False keeps none out. For `Tokens`.
    backend: "reference" (the oracle), "torch" (fast anywhere), "triton" (kernels for GPUs), or "auto": the one that the
        variable DEPASS_FAST_BACKEND names, else triton on a GPU where it can run, else torch.
    compute_dtype: dtype of the products. Default: the model's on a GPU, where the triton backend takes float16 with a
        scale per row for bfloat16, which is nearer and as fast; the state's on a CPU, but float32 at least.
        Half precision rounds the gates: near a tie that changes whom `max` gives everything to.
    value_activation: the activation, mostly SiLU, behind the values of recurrent layers. "frozen" keeps it at its ratio
        act(c) / c; "shared" shares it out by the allocation, as a neuron's is. Under a linear rule both are the same.
    state_dtype: dtype of the component state. Default: float32; float64 for a float64 model.
    memory_budget: bytes of workspace for components, beyond the state, the trace and a copy of one layer's weights.
        Default: what the plan finds room for, at most 32 MiB on a CPU and 1 GiB on a GPU. It is halved, with a warning,
        where memory runs out all the same; results do not change.
    stream: True keeps the component state in host memory, from where it passes through the device in blocks, twice per
        MLP; same numbers, half as much arithmetic again. "auto" (default): where the device has no room for the state.
    shard: the ranks of a one-dimensional `torch.distributed` mesh, or of a process group, each of which carries its
        part of the components on its own device (docs/scale.md). Every rank makes the same calls and has the same
        results. For attributions by the torch backend and a rule by name. None (default): one process has all.
    progress: True shows a bar after two seconds, on a terminal only.
    verify: True recomputes a sample of positions with the reference operations at every step, in float64, and reports
        how far the backend is off in the result's ``verification`` (:class:`depass_fast.Verification`), in the states
        and in what a step adds to them. Same results; a short prompt takes a few times as long. Exact runs only.
    chat_template_kwargs: arguments of the tokenizer's chat template for prompts that are chat messages, such as
        ``{"tools": [...], "enable_thinking": False}``. ``add_generation_prompt`` or ``continue_final_message`` among
        them say how the prompt ends. Default: a last message of the assistant's is continued, else its turn begins.
    """

    allocation: RuleName | Rule = "softmax"
    temperature: float = 0.1
    exclude_special: bool | Sequence[int] = True
    backend: BackendName = "auto"
    compute_dtype: torch.dtype | str | None = None
    value_activation: Literal["frozen", "shared"] = "frozen"
    state_dtype: torch.dtype | str | None = None
    memory_budget: int | None = None
    stream: bool | Literal["auto"] = "auto"
    shard: DeviceMesh | ProcessGroup | None = None
    progress: bool = True
    verify: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None

    __repr__ = brief_repr

    def updated(self, overrides: Mapping[str, Any]) -> Options:
        """Return these options with some replaced. Raises TypeError for an unknown name."""
        known = [f.name for f in fields(self)]
        for name in overrides:
            if name not in known:
                hint = " The rule of attribute(...) is its allocation." if name == "rule" else ""
                raise TypeError(f"unknown option {name!r}; options: {', '.join(known)}.{hint}")
        return replace(self, **overrides)

    def build(self, adapter: Adapter) -> Run:
        """Return the checked run that these options ask for, for the model of ``adapter``.

        Raises:
            ValueError: an option is out of range, or does not go with another one.
            TypeError: an option is of the wrong type.
        """
        refuse_autocast(adapter.device)
        self._check_values()
        allocation = Allocation(self.allocation, self.temperature)
        if allocation.needs_activations:
            adapter.check_linear_rule(str(allocation.rule))
        state, compute = self.dtypes(adapter.dtype, adapter.device)
        choose = resolve if self.shard is None else choose_backend  # what is not taken is not logged
        choice = choose(self.backend, adapter.device, widest(state, compute, adapter.dtype))
        backend = make_backend(
            choice.name, compute, self.memory_budget, self.takes_float16(adapter.dtype, adapter.device)
        )
        if backend.compute_dtype is None and self.compute_dtype is not None and compute != state:
            raise ValueError(
                f"compute_dtype: the {backend.name} backend computes in the state's dtype; set state_dtype."
            )
        self.check_sharing(adapter)
        self._check_blocks(backend)
        if self.stream is True:
            self._check_streaming(backend, choice)
            backend = StreamBackend(adapter.device, compute, self.memory_budget)
        if self.shard is not None:
            ranks = self._checked_ranks(adapter, choice)
            backend = ShardBackend(ranks, adapter.device, compute, self.memory_budget, self.stream is True)
        return Run(
            allocation=allocation,
            backend=backend,
            state_dtype=state,
            memory_budget=self.memory_budget,
            progress=bool(self.progress),
            verifier=Verifier() if self.verify else None,
            shares_values=self.value_activation == "shared",
        )

    def _check_values(self) -> None:
        """Refuse options whose value alone is wrong."""
        budget = self.memory_budget
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
            raise ValueError(f"memory_budget: expected a positive number of bytes, got {budget!r}.")
        if not isinstance(self.temperature, (int, float)) or isinstance(self.temperature, bool):
            raise TypeError(f"temperature: expected a positive number, got {self.temperature!r}.")
        if not isinstance(self.stream, bool) and self.stream != "auto":
            raise ValueError(f"stream: expected True, False or 'auto', got {self.stream!r}.")
        if self.value_activation not in ("frozen", "shared"):
            raise ValueError(f"value_activation: expected 'frozen' or 'shared', got {self.value_activation!r}.")
        if not isinstance(self.verify, bool):
            raise TypeError(f"verify: expected True or False, got {self.verify!r}.")
        check_template_kwargs(self.chat_template_kwargs)

    def check_sharing(self, adapter: Adapter) -> None:
        """Raise ValueError where activations of values are to be shared and the model has none."""
        if self.value_activation == "shared" and not any(map(adapter.activates_values, range(adapter.n_layers))):
            raise ValueError(
                "value_activation: no layer of this model has an activation behind its values (some recurrences do: "
                "Mamba, gated DeltaNet); leave it out."
            )

    def _check_blocks(self, backend: Backend) -> None:
        """Refuse ``value_activation="shared"`` for a rule that is no statistic."""
        if self.value_activation == "shared" and callable(self.allocation) and backend.name != "reference":
            raise ValueError(
                f"value_activation: {Allocation(self.allocation).name} sees all components at once, and values come in "
                "blocks; take backend='reference', or one of the rules by name."
            )

    def _check_streaming(self, backend: Backend, choice: Choice) -> None:
        """Refuse ``stream=True`` for a backend by name that does not stream, and for a user's own rule."""
        if not backend.streamable and not choice.automatic:
            raise ValueError(f"stream: the {choice.name} backend does not stream; take backend='torch'.")
        if callable(self.allocation):
            raise ValueError(
                f"stream: {Allocation(self.allocation).name} sees all components at once, which streaming never holds; "
                "take stream=False, or one of the rules by name."
            )

    def _checked_ranks(self, adapter: Adapter, choice: Choice) -> Ranks:
        """Return the ranks of ``shard``. Refuse what goes with it no more than with streaming, or not at all."""
        ranks, rule = Ranks.of(self.shard, adapter.device), self.allocation
        if choice.name != TorchBackend.name and not choice.automatic:
            raise ValueError(f"shard: the {choice.name} backend carries all components; take backend='torch'.")
        if callable(rule):
            raise ValueError(
                f"shard: {Allocation(rule).name} sees all components at once, which no rank holds; take shard=None, or "
                "one of the rules by name."
            )
        if self.verify:
            raise ValueError("shard: verify=True recomputes with all components, which no rank holds; leave one out.")
        if is_spread(adapter):
            raise ValueError(
                "shard: the model's layers lie on several devices; every rank holds the whole model on one of its own."
            )
        return ranks

    def dtypes(self, model: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes of the state and of the products, for a model of a dtype on a device."""
        state = parse_dtype(self.state_dtype, "state_dtype")
        state = state or (torch.float64 if model == torch.float64 else torch.float32)
        compute = parse_dtype(self.compute_dtype, "compute_dtype")
        return state, compute or (model if device.type != "cpu" else torch.promote_types(state, torch.float32))

    def takes_float16(self, model: torch.dtype, device: torch.device) -> bool:
        """True if the triton backend may compute in float16 with scales for a model of a dtype on a device."""
        return self.compute_dtype is None and model == torch.bfloat16 and device.type != "cpu"

    def excluded(self, length: int) -> set[int]:
        """Return the positions of special tokens in a prompt of ``length`` tokens."""
        if isinstance(self.exclude_special, bool):
            return {0} if self.exclude_special else set()
        if not isinstance(self.exclude_special, Iterable):
            raise TypeError(
                f"exclude_special: expected True, False or a list of positions, got {self.exclude_special!r}."
            )
        positions = set()
        for p in (as_index(p, "exclude_special") for p in self.exclude_special):
            if not -length <= p < length:
                raise ValueError(f"exclude_special: position {p} is out of range for a prompt of {length} tokens.")
            positions.add(p % length)
        return positions


def is_spread(adapter: Adapter) -> bool:
    """True if the layers of a model lie on several devices."""
    return len({adapter.layer_device(index) for index in range(adapter.n_layers)}) > 1


class OptionValues(TypedDict, total=False):
    """The fields of :class:`Options` as keyword arguments, so that an editor knows them."""

    allocation: RuleName | Rule
    temperature: float
    exclude_special: bool | Sequence[int]
    backend: BackendName
    compute_dtype: torch.dtype | str | None
    value_activation: Literal["frozen", "shared"]
    state_dtype: torch.dtype | str | None
    memory_budget: int | None
    stream: bool | Literal["auto"]
    shard: DeviceMesh | ProcessGroup | None
    progress: bool
    verify: bool
    chat_template_kwargs: Mapping[str, Any] | None


class CallValues(OptionValues, total=False):
    """The keyword arguments of an attribution that do not change what type it returns."""

    contrast: int | str | None
    targets: Sequence[Any] | None
    end: int | str | None
    method: MethodName | Adjoint | None


class LookValues(OptionValues, total=False):
    """The keyword arguments of an explanation of attention."""

    query: int
    key: int | tuple[int, int] | None


class CreditValues(OptionValues, total=False):
    """The keyword arguments of a credit of attention."""

    rule: LinearRuleName | None
    contrast: int | str | None
    targets: Sequence[Any] | None
    position: int


@dataclass(frozen=True)
class Adjoint:
    """The adjoint sweep as a ``method``: first-order scores, of which the largest are refined (docs/adjoint.md).

    refine: how many of the largest scores are replaced by exact ones, given log Z.
    within: "all" refines the largest of all layers together, "layer" as many of every layer.
    sample: how many components are drawn to estimate the error, beside a few of every start layer. 0: no estimate.
    seed: seed of everything that is drawn at random.

    Raises:
        ValueError: a number is below zero, or ``within`` is another word.
        TypeError: a number is no integer.
    """

    refine: int = 64
    within: Literal["all", "layer"] = "all"
    sample: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.within not in ("all", "layer"):
            raise ValueError(f"within: {self.within!r} is not one of 'all', 'layer'.")
        for name in ("refine", "sample", "seed"):
            value = as_index(getattr(self, name), name)
            if not 0 <= value < 2**63:
                raise ValueError(f"{name}: {value} is out of range; it must be at least 0, and below 2^63.")
            object.__setattr__(self, name, value)


LINEAR = Adjoint(refine=0, sample=0)  # of a linear rule, which leaves nothing to refine or to sample
