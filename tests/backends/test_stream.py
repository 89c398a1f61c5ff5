"""A state that streams through the device in blocks has the same numbers, whatever the blocks."""

import numpy as np
import pytest
import torch

from depass_fast import Custom, DePass, Heads, Neurons, Options, Tokens
from depass_fast.allocation import NAMES
from depass_fast.backends import StreamBackend
from depass_fast.backends import stream as stream_module
from depass_fast.backends.torch import blocks, bounded
from depass_fast.planning import fit as fitting
from depass_fast.planning.shapes import RunShape
from tests.support.components import kinds
from tests.support.devices import small_gpu
from tests.support.family_models import available, build_variant
from tests.support.models import FAMILIES, build, random_ids
from tests.support.states import close, corner_states
from tests.support.steps import carried


@pytest.mark.parametrize(
    ("name", "rule"),  # a rule knows nothing of the attention: all of them where there are biases, else one
    [(name, rule) for name in FAMILIES for rule in NAMES if name == "llama-biases" or rule == "softmax"],
)
def test_streaming_agrees_with_the_reference(name, rule):
    dp, ids = build(name), random_ids(9, seed=5)
    trace = dp.trace(ids)
    for label, kind in kinds(len(ids)).items():
        oracle = dp.decompose(trace, kind, allocation=rule, backend="reference").dense()
        for budget in (2_000, None):
            state = dp.decompose(trace, kind, allocation=rule, stream=True, memory_budget=budget)
            assert close(state.dense(), oracle), (label, budget)


@pytest.mark.parametrize("rule", NAMES)
def test_blocks_of_every_size_from_one_to_all(rule, monkeypatch):
    """Components at a time, 1 to M, in attention and in both passes of the MLP."""
    dp, prompts = build("llama-biases"), [random_ids(7, seed=2), random_ids(4, seed=3)]
    trace = dp.trace(prompts)
    for kind in (Tokens(), Heads(0)):
        oracle = dp.decompose(trace, kind, allocation=rule, backend="reference").rows
        for size in range(1, 9):

            def cut(layout, slots, device, extras_only=False, begin=(0, 0), size=size):
                """Blocks with as many slots as ``size`` components take at all positions."""
                longest = int(np.bincount(layout.prompt).max())
                return blocks.make_blocks(layout, size * longest, device, extras_only, begin)

            monkeypatch.setattr(bounded, "make_blocks", cut)
            assert close(dp.decompose(trace, kind, allocation=rule, stream=True).rows, oracle), size


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases"])
def test_the_corners(name, rule):
    """Absent components, duplicates, opposite ones, and positions where nobody is eligible."""
    dp, ids = build(name, torch.float64), random_ids(8)
    trace = dp.trace(ids)
    kind = Custom(1, corner_states(trace).double())
    oracle = dp.decompose(trace, kind, allocation=rule, backend="reference").dense()
    for budget in (2_000, None):
        state = dp.decompose(trace, kind, allocation=rule, stream=True, memory_budget=budget)
        assert close(state.dense(), oracle, 1e-10) and not state.dense()[:, 4].any()
        options = {"exclude_special": list(range(8)), "allocation": rule, "end": 2}
        oracle_of_all = dp.decompose(trace, Tokens(), backend="reference", **options).rows
        assert close(
            dp.decompose(trace, Tokens(), stream=True, memory_budget=budget, **options).rows, oracle_of_all, 1e-10
        )


@pytest.mark.parametrize("position", [-1, 0, 3])
def test_attributions_stream_too(family, position):
    ids = [random_ids(8, seed=2), random_ids(5, seed=3)]
    for kind in (Tokens(), Tokens(1), Heads(-1), Neurons(0)):
        for usual, streamed in zip(
            family.attribute(ids, kind, 7, position=position),
            family.attribute(ids, kind, 7, position=position, stream=True, memory_budget=5_000),
            strict=True,
        ):
            assert close(streamed.scores, usual.scores) and streamed.labels == usual.labels
            assert streamed.completeness_error < 1e-5


def test_what_cannot_stream_is_refused():
    dp, ids = build("llama-gqa"), random_ids(5)
    with pytest.raises(ValueError, match="stream: the reference backend does not stream"):
        dp.attribute(ids, Tokens(), stream=True, backend="reference")

    def own(gates, temperature):
        return gates.values

    with pytest.raises(ValueError, match="stream: own sees all components at once"):
        dp.attribute(ids, Tokens(), stream=True, allocation=own)
    with pytest.raises(ValueError, match="stream: expected True, False or 'auto'"):
        dp.attribute(ids, Tokens(), stream="yes")


@pytest.mark.parametrize("rule", ["softmax", "linear"])
@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "gpt_neox: parallel", "olmo2: biases", "gemma2", "mpt: clamped, scaled"]
)
def test_experts_parallel_layers_and_norms_anywhere(name, rule):
    if not available(name):
        pytest.skip("not in this version of transformers")
    # in float64: at T = 0.1 a softmax makes much of the rounding of its gates
    dp, ids = DePass(build_variant(name), allocation=rule, state_dtype="float64"), random_ids(9, seed=5)
    trace = dp.trace(ids)
    for kind in (Tokens(), Heads(1), Neurons(0)):
        oracle = dp.decompose(trace, kind, backend="reference").rows
        for budget in (20_000, None):
            state = dp.decompose(trace, kind, stream=True, memory_budget=budget)
            assert close(state.rows, oracle, 1e-10), budget
        partition = dp.partition(trace, kind)
        chosen = [partition.labels[0], partition.labels[-1]]
        focus = dp.focus(trace, kind, chosen, partition=partition)
        last = dp.carry(trace, dp.start(trace, kind), 3, backend="reference")
        expected = last.dense()[:, [last.labels.index(label) for label in chosen]]
        assert float((focus.entering(3) - expected).abs().max()) <= 1e-10 * float(last.rows.abs().max())


def test_a_run_streams_where_the_device_has_no_room(monkeypatch):
    """The choice alone, for a device that is not there."""
    kind, lengths, adapter = Tokens(), [60], build("llama-gqa").adapter
    placed = small_gpu(monkeypatch, lengths, kind)

    def chosen(**options):
        options = Options(**options)
        shape = RunShape(placed, lengths, kind, options, None, False)
        return fitting.fitted(options.build(adapter), shape)

    assert chosen().host and chosen().workspace(placed.device) == 1 << 20  # there is room for no more
    with pytest.raises(MemoryError, match=r"It fits with stream=True"):
        chosen(stream=False)
    with pytest.raises(MemoryError, match="tokens: needs"):
        chosen(allocation=lambda gates, temperature: gates.values)

    room = fitting.available(placed.device)
    monkeypatch.setattr(fitting, "available", lambda device: room if device.type == "cuda" else 1000)
    with pytest.raises(MemoryError, match="needs .* in host memory and 1000 B are available"):
        chosen(stream=True)
    with pytest.raises(MemoryError, match="tokens: needs"):  # nor has the host room
        chosen()
    monkeypatch.setattr(fitting, "available", lambda device: room if device.type == "cuda" else 1 << 40)
    assert chosen().host
    monkeypatch.setattr(fitting, "is_spread", lambda adapter: True)  # states stream to one device only
    with pytest.raises(MemoryError, match="tokens: needs"):
        chosen()


@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [
        ("llama: biases", 2, 2),
        ("gpt_neox: parallel", 3, 2),  # the MLP reads what the attention has not written to
        ("opt: stream norms, projected embedding", 3, 2),  # what a norm of the stream makes of it is gathered apart
    ],
)
@pytest.mark.parametrize("kind", [Tokens(), Heads(0)], ids=["tokens", "heads"])
def test_a_layer_takes_two_passes(name, loads, stores, kind, monkeypatch):
    """The times that a row goes to the device and comes back, per layer."""
    dp, moved = DePass(build_variant(name), state_dtype="float64"), {"_take": 0, "_put": 0}

    def count(method):
        usual = getattr(StreamBackend, method)

        def counted(backend, state, block, *rest):
            moved[method] += sum(map(len, stream_module._runs(state, block)))
            return usual(backend, state, block, *rest)

        monkeypatch.setattr(StreamBackend, method, counted)

    count("_take")
    count("_put")
    trace = dp.trace(random_ids(6))
    state = dp.decompose(trace, kind, stream=True, memory_budget=20_000)
    layers, first = dp.adapter.n_layers, (0, 0)
    if isinstance(kind, Heads):
        layers -= 1
        if not dp.adapter.layer(0).parallel:  # they start behind an attention, before an MLP that gathers for itself
            first = (2, 1)
    n_rows = state.layout.n_rows
    assert moved == {"_take": n_rows * (layers * loads + first[0]), "_put": n_rows * (layers * stores + first[1])}


@pytest.mark.parametrize("name", ["llama: biases", "gpt_neox: parallel", "mpt: clamped, scaled", "mixtral"])
def test_nothing_is_read_from_host_memory_before_it_is_there(name, monkeypatch):
    """Copies to host memory happen when a device's do: not before something waits for them."""
    if not available(name):
        pytest.skip("not in this version of transformers")
    dp, ids = DePass(build_variant(name), state_dtype="float64"), random_ids(12, seed=5)
    trace = dp.trace(ids)
    reads = [range(2, 12)]  # more than are computed one by one

    def propagated(**options):
        run = dp.options.updated(options).build(dp.adapter)
        return carried(dp, trace, dp.start(trace, Tokens()), dp.adapter.n_layers, run, reads)[0].rows

    expected = propagated(), dp.attribute(trace, Heads(0), 7).scores, dp.decompose(trace, Tokens()).rows
    pending, take, put = [], StreamBackend._take, StreamBackend._put

    def flush():
        while pending:
            pending.pop(0)()

    def taken(backend, *arguments):
        flush()  # the device does one after the other
        return take(backend, *arguments)

    monkeypatch.setattr(StreamBackend, "_put", lambda *arguments: pending.append(lambda: put(*arguments)))
    monkeypatch.setattr(StreamBackend, "_take", taken)
    monkeypatch.setattr(StreamBackend, "_arrived", staticmethod(lambda device: flush()))
    options = {"stream": True, "memory_budget": 20_000}
    found = propagated(**options), dp.attribute(trace, Heads(0), 7, **options).scores
    found = (*found, dp.decompose(trace, Tokens(), **options).rows)
    for got, right in zip(found, expected, strict=True):
        assert close(got, right, 1e-10)
