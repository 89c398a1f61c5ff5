"""AttnLRP, and the rule `shapley` with attention's credit shared with its queries and keys.

Gradient × activation of a copy of the model, made by hooks, whose backward pass is another one:

- norms have their scale frozen, those of queries and keys with them, unless these are LayerNorms;
- an MLP's activation is the linear function of its gate and up projection that a linear rule makes of it
  (:mod:`depass_fast.linear_rules`): `half` in AttnLRP;
- of attention's credit a share goes to queries and keys, half of that to each, the rest to the values. The softmax has
  its ordinary gradient: what queries and keys receive need not sum to that share, so these scores are not complete.

See Achtibat et al. 2024, and their efficient implementation: a gradient divided by 4, 4 and 2 at Q, K and V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...adapters import Norm
from ...engine import DePass
from ...linear_rules import linear_shares
from ...trace.attention import causal_attention
from ...trace.exclusive import change_config, exclusive, one_at_a_time
from ...trace.record import Trace
from .base import Found, NotPossibleError, Subject, by_read
from .gradients import gradient_times_activation

ATTENTION_NAME = "depass_fast_relevance"
CREDIT = 0.5  # of attention's credit, to queries and keys


def relevance(subject: Subject, rule: str, method: str) -> Found:
    """Return gradient × activation of the copy under a linear ``rule``, with half of attention's credit to Q and K.

    Raises:
        NotPossibleError: the model is a mixture of experts, or its attention does not go through transformers'
            interface.
    """
    engine, question = subject.engine, subject.question
    with copied(engine, subject.trace, rule, CREDIT):
        scores = gradient_times_activation(engine, question.ids, question.values, subject.kinds)
    return {kind: by_read(method, one) for kind, one in scores.items()}


@contextmanager
def copied(engine: DePass, trace: Trace, rule: str, credit: float) -> Iterator[None]:
    """Have the model run as the copy on the prompt of ``trace``; ``credit`` of attention's goes to queries and keys."""
    adapter = engine.adapter
    if adapter.observed is not None:
        raise NotPossibleError("the model's attention does not go through transformers' interface.")
    if not adapter.is_uniform:
        raise NotPossibleError(f"the model has {', '.join(adapter.beyond_plain)}.")
    if adapter.selects is not None:
        raise NotPossibleError("an indexer selects the keys of the model's attention.")
    if any(adapter.is_mixture(index) for index in range(adapter.n_layers)):
        raise NotPossibleError("the model is a mixture of experts, whose activations cannot be replaced.")
    with one_at_a_time, exclusive(adapter) as undo:
        of_stream = dict(adapter.norms())
        for module, norm in of_stream.items():
            undo.callback(module.register_forward_hook(_frozen_norm(norm)).remove)
        for index in range(adapter.n_layers):
            for module in adapter.module(index, "attention").modules():
                if "RMSNorm" in type(module).__name__ and module not in of_stream:
                    undo.callback(module.register_forward_hook(_by_ratio).remove)
            _share_activation(engine, trace, index, rule, undo)
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention(engine, trace, credit))
        change_config(adapter, "_attn_implementation", ATTENTION_NAME, undo)
        yield


def frozen(value: Tensor, way: Tensor) -> Tensor:
    """Return ``value``, with the derivative of ``way``."""
    return value.detach() + (way - way.detach())


def _frozen_norm(norm: Norm) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].flatten(0, -2)
        return frozen(output, norm.apply(x, norm.scale(x).detach()).view(output.shape))

    return hook


def _by_ratio(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return frozen(output, torch.where(args[0] == 0, 0.0, output / args[0]).detach() * args[0])


def _share_activation(engine: DePass, trace: Trace, index: int, rule: str, undo: ExitStack) -> None:
    """Make the activation of a layer's MLP the linear function of its gate and up projection that ``rule`` says."""
    adapter, seen = engine.adapter, {}
    (mlp,), record = adapter.mlps(index), trace.layers[index].mlp
    shares = linear_shares(rule, mlp, record, slice(None), torch.promote_types(record.act.dtype, torch.float32))

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = output[0]

        return hook

    def replace(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        way = shares.gate * mlp.gate.select(seen["gate_proj"])
        if shares.up is not None and mlp.up is not None:
            way = way + shares.up * mlp.up.select(seen["up_proj"])
        return (frozen(args[0], way.to(args[0].dtype).view(args[0].shape)), *args[1:])

    for name in ("gate_proj", "up_proj"):
        module = adapter.module(index, name)
        if module is not None:
            undo.callback(module.register_forward_hook(keep(name)).remove)
    undo.callback(adapter.module(index, "down_proj").register_forward_pre_hook(replace).remove)


def _attention(engine: DePass, trace: Trace, credit: float) -> Callable[..., tuple[Tensor, None]]:
    """Return the attention function of one prompt, in transformers' form, with the credit of Q, K and V in it."""
    adapter = engine.adapter
    layers = {id(adapter.module(i, "attention")): one.attention for i, one in enumerate(trace.layers)}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        one = layers[id(module)]
        query, key = (frozen(x, credit / 2 * x) for x in (query, key))
        value = frozen(value, (1 - credit) * value)
        sinks = kwargs.get("s_aux")
        out, _ = causal_attention(
            query, key, value, one.scale, one.window, one.softcap, sinks=sinks, chunked=one.chunked
        )
        return out.transpose(1, 2).contiguous(), None

    return attend
