"""A few components, carried alone with the partition function of all, equal those of the full run."""

import pytest
import torch

from depass_fast import Custom, Heads, Neurons, Subspaces, Tokens
from depass_fast.allocation import NAMES
from tests.support.components import kinds
from tests.support.models import FAMILIES, build, random_ids
from tests.support.states import close, corner_states


def agree(dp, trace, kind, focus, tolerance=1e-5, **options):
    """The chosen ones at every layer, against the full states of the reference backend."""
    whole = dp.start(trace, kind, **options)
    assert focus.layers == list(range(focus.layers[0], focus.layers[-1] + 1))
    for states, layer in zip(focus.states, focus.layers, strict=True):
        if layer > focus.layers[0]:
            whole = dp.carry(trace, whole, layer, backend="reference", **options)
        expected = whole.dense()[:, [whole.labels.index(label) for label in focus.labels]]
        scale = float(whole.dense().abs().max())
        assert float((states - expected).abs().max()) <= tolerance * scale, layer


RULED = [(name, rule) for name in FAMILIES for rule in NAMES if name == "qwen3-biases" or rule in ("softmax", "half")]


@pytest.mark.parametrize(("name", "rule"), RULED)
def test_the_chosen_ones_equal_the_full_run(name, rule):
    dp, ids = build(name), random_ids(9, seed=5)
    trace = dp.trace(ids)
    for label, kind in kinds(len(ids)).items():
        partition = dp.partition(trace, kind, allocation=rule)
        assert partition.completeness_error < 1e-5
        labels = partition.labels
        which = [labels[-1], labels[0], labels[len(labels) // 2]]
        focus = dp.focus(trace, kind, which, partition=partition, allocation=rule)
        assert focus.labels == which and focus.layers[-1] == 3, label
        agree(dp, trace, kind, focus, allocation=rule)


@pytest.mark.parametrize("rule", NAMES)
@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases"])
def test_the_corners(name, rule):
    dp, ids = build(name, torch.float64), random_ids(8)
    trace = dp.trace(ids)
    custom = Custom(1, corner_states(trace).double())
    for kind, excluded in ((custom, True), (Tokens(), list(range(8)))):
        options = {"allocation": rule, "exclude_special": excluded}
        for which in ([0], [1, 3], [-1, 2]):
            agree(dp, trace, kind, dp.focus(trace, kind, which, **options), 1e-11, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_all_of_them_one_by_one_are_the_whole(backend):
    """Triton's partition is torch's: log Z is not asked of its kernels."""
    dp, ids = build("qwen2"), random_ids(6)
    trace, options = dp.trace(ids), {"backend": backend}
    for kind in (Tokens(1), Heads(0), Neurons(0)):
        partition = dp.partition(trace, kind, **options)
        members = range(len(partition.labels))
        alone = [dp.focus(trace, kind, [m], partition=partition, **options) for m in members]
        for layer in alone[0].layers[1:]:
            total = torch.cat([focus.entering(layer) for focus in alone], dim=1).sum(1)
            assert close(total, trace.resid(layer))


def test_a_partition_is_small_and_its_size_known():
    dp, ids = build("llama-gqa"), random_ids(6)
    partition = dp.partition(ids, Tokens())
    assert partition.nbytes == 3 * (2 * 6 * 48 + 6) * 4
    assert len(partition.labels) == 6
    assert dp.partition(ids, Tokens(), allocation="taylor").nbytes == 0


def test_an_end_before_the_last_layer():
    dp, ids = build("llama-gqa"), random_ids(6)
    trace = dp.trace(ids)
    focus = dp.focus(trace, Tokens(), [2], end=2)
    assert focus.layers == [0, 1, 2] and focus.states[0].shape == (6, 1, 32)
    agree(dp, trace, Tokens(), focus)
    with pytest.raises(ValueError, match="layer: 3 is out of range; held are 0 to 2"):
        focus.entering(3)


def test_bad_input_is_refused():
    dp, ids = build("llama-gqa"), random_ids(6)
    trace = dp.trace(ids)
    partition = dp.partition(trace, Tokens())
    for which, message in (
        (["Paris"], "which: no component 'Paris'; labels run from"),
        ([6], "which: component 6 is out of range; there are 6"),
        ([], "which: empty"),
    ):
        with pytest.raises(ValueError, match=message):
            dp.focus(trace, Tokens(), which, partition=partition)
    for other, options in ((Tokens(1), {}), (Tokens(), {"temperature": 0.2}), (Tokens(), {"exclude_special": False})):
        with pytest.raises(ValueError, match="partition: it was made of other components"):
            dp.focus(trace, other, [0], partition=partition, **options)
    basis = torch.eye(32)[:, :2]
    subspaces = dp.partition(trace, Subspaces(1, [basis]))
    dp.focus(trace, Subspaces(1, [basis.clone()]), [0], partition=subspaces)
    with pytest.raises(ValueError, match="partition: it was made of other components"):
        dp.focus(trace, Subspaces(1, [torch.eye(32)[:, 2:4]]), [0], partition=subspaces)
    with pytest.raises(ValueError, match="prompt: one at a time can be looked at closely, got 2"):
        dp.focus([ids, ids], Tokens(), [0])
    with pytest.raises(ValueError, match="backend: the reference backend carries all components at once"):
        dp.focus(trace, Tokens(), [0], backend="reference")
