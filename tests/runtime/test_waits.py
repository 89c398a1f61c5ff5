"""The host waits for a GPU neither once per layer nor once per prompt. The waits are counted without a GPU."""

import sys
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import depass_fast.backends.triton.backend as triton_backend
import depass_fast.backends.triton.linear as triton_linear
from depass_fast import DePass, Heads, LogProb, Modules, Neurons, Tokens
from depass_fast.runtime.transfer import pack, to_device, unpack
from depass_fast.trace.record import Trace
from depass_fast.trace.recorder import Recorder
from tests.support.family_models import available, build_model
from tests.support.models import random_ids
from tests.support.tokenizers import byte_level

ON_THE_HOST = (
    "depass_fast.results.attribution",
    "depass_fast.readout.assemble",
    "depass_fast.readout.collect",
    "depass_fast.inputs.doubts",
    "depass_fast.inputs.prompts",
    "depass_fast.inputs.token_texts",
)  # no tensor of a device gets there
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")


class _Counting(TorchDispatchMode):
    """Operations whose result the host has to know, or whose shape depends on values."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [x for a in args if isinstance(a, list | tuple) for x in a if isinstance(x, torch.Tensor)]
        masked = name.startswith("index") and any(x.dtype in (torch.bool, torch.uint8) for x in masks)
        if masked or name in WAITS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def waits(monkeypatch):
    """Counts waits, copies to the host, and arrays that reach a device in another way than by `to_device`."""
    counting, from_numpy, cpu, tolist = _Counting(), torch.from_numpy, torch.Tensor.cpu, torch.Tensor.tolist

    def counted_from_numpy(array):
        if sys._getframe(1).f_code is not to_device.__code__:
            counting.found["from_numpy"] += 1
        return from_numpy(array)

    def counted_cpu(self, *given, **named):
        counting.found["cpu"] += 1
        return cpu(self, *given, **named)

    def counted_tolist(self):
        counting.found["tolist"] += sys._getframe(1).f_globals["__name__"] not in ON_THE_HOST
        return tolist(self)

    with monkeypatch.context() as patch, counting:
        patch.setattr(torch, "from_numpy", counted_from_numpy)
        patch.setattr(torch.Tensor, "cpu", counted_cpu)
        patch.setattr(torch.Tensor, "tolist", counted_tolist)
        yield counting.found


@pytest.fixture
def no_kernels(monkeypatch):
    """The triton backend without its kernels, whose interpreter would read scalars."""
    kernels = {
        (triton_backend.attention, "mix"): lambda *given, **_: given[7].zero_(),
        (triton_backend.probabilities, "log_sum_exp"): lambda frozen, *_: frozen.q.new_zeros(frozen.q.shape[:2]),
        (triton_backend.rows, "read_rows"): lambda *given: given[5].zero_(),
        (triton_backend.rows, "read_out"): lambda rows, directions, *_: rows.new_zeros(len(rows), len(directions)),
        (triton_backend, "allocate"): lambda gates, *_: gates.zero_(),
        (triton_linear, "share_linearly"): lambda gates, *_: gates.zero_(),
    }
    for (home, name), stub in kernels.items():
        monkeypatch.setattr(home, name, stub)
    monkeypatch.setattr("depass_fast.backends.selection.why_not_triton", lambda *_: None)


KINDS = (Tokens(), Heads(0), Neurons(0), Heads(layers="all"), Neurons(layers="all"), Modules(layers="all"))


DENSE = "llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
MIXTURES = {
    "qwen2_moe": {"num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 2, "moe_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16},
}


def _traced(n_layers: int, n_prompts: int, model_type: str, changes: dict, tokenizer=None) -> tuple[DePass, Trace]:
    dp = DePass(build_model(model_type, num_hidden_layers=n_layers, **changes), tokenizer, backend="triton")
    return dp, dp.trace([random_ids(5 + prompt % 2, seed=prompt) for prompt in range(n_prompts)])


def _counts(monkeypatch, n_layers: int, n_prompts: int, kind, model=DENSE, target=None, tokenizer=None) -> Counter:
    dp, traced = _traced(n_layers, n_prompts, *model, tokenizer)
    with waits(monkeypatch) as found:
        dp.attribute(traced, kind, target, method="exact")
    return found


def test_waits_do_not_grow_with_log_probabilities(monkeypatch, no_kernels):
    few = _counts(monkeypatch, 2, 1, Tokens(), target=[LogProb()])
    assert few["from_numpy"] == 0
    assert _counts(monkeypatch, 2, 4, Tokens(), target=[LogProb(5), LogProb(), 9, LogProb(9)]) == few
    plain = _counts(monkeypatch, 2, 1, Tokens())
    assert few.total() == plain.total() + 1  # log Z is compared


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_waits_do_not_grow_with_layers_or_prompts(kind, monkeypatch, no_kernels):
    few = _counts(monkeypatch, 2, 1, kind)
    assert few["from_numpy"] == 0
    assert _counts(monkeypatch, 5, 1, kind) == few == _counts(monkeypatch, 2, 4, kind)


@pytest.mark.filterwarnings("ignore:prompt. it begins with no start token")
def test_nor_with_the_words_of_a_tokenizer(monkeypatch, no_kernels):
    tokenizer = byte_level(*" abcdefgh", bos_token="<s>")
    vocabulary = {**DENSE[1], "vocab_size": len(tokenizer)}
    few, many = (_counts(monkeypatch, 2, n, Tokens(), ("llama", vocabulary), 3, tokenizer) for n in (1, 4))
    assert few == many and few["from_numpy"] == 0


def _mixture(model_type: str) -> tuple[str, dict]:
    if not available(model_type):
        pytest.skip("the installed transformers does not have it")
    return model_type, MIXTURES[model_type]


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nor_with_the_experts_of_a_mixture(kind, model_type, monkeypatch, no_kernels):
    mixture = _mixture(model_type)
    few = _counts(monkeypatch, 2, 1, kind, mixture)
    assert few["from_numpy"] == 0
    assert _counts(monkeypatch, 5, 1, kind, mixture) == few == _counts(monkeypatch, 2, 4, kind, mixture)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_routes_are_copied_once_for_all_layers(model_type, monkeypatch):
    for layers in (2, 5):
        with monkeypatch.context() as patch:
            found, make = [], Recorder.trace

            def counted(*given, found=found, make=make):
                with waits(monkeypatch) as counter:
                    trace = make(*given)
                found.append(counter)
                return trace

            patch.setattr(Recorder, "trace", counted)
            _traced(layers, 2, *_mixture(model_type))
        assert found == [Counter(cpu=1)]


def test_arrays_that_travel_together_arrive_as_they_were():
    arrays = [np.arange(7, dtype=np.int32), np.zeros((0, 6), np.int32), np.arange(12).reshape(3, 4)[:, ::2]]
    arrays += [np.full(5, 200, np.uint8), np.array([2**40])]
    packed, begins = pack(arrays)
    found = unpack(torch.from_numpy(packed), arrays, begins)
    for tensor, array in zip(found, arrays, strict=True):
        assert tensor.dtype == torch.from_numpy(np.ascontiguousarray(array)).dtype
        assert np.array_equal(tensor.numpy(), array) and tensor.data_ptr() % 16 == packed.ctypes.data % 16
