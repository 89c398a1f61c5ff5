"""The user's settings for products hold for the model, the pinned ones for the library, and then the user's again."""

import threading

import pytest
import torch

from depass_fast import Adjoint, DePass, Neurons
from depass_fast.adjoint.maps import LayerMaps
from depass_fast.backends.torch.backend import TorchBackend
from depass_fast.runtime.precision import full_precision
from tests.support.family_models import build_model
from tests.support.models import random_ids

MATMUL = torch.backends.cuda.matmul
NAMES = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction_split_k",
    "allow_fp16_reduced_precision_reduction_split_k",
    "allow_fp16_accumulation",
    "fp32_precision",
)
NEW = hasattr(MATMUL, "fp32_precision")


def settings() -> dict:
    found = {name: getattr(MATMUL, name, None) for name in NAMES}
    for module in (torch.backends, torch.backends.mkldnn, getattr(torch.backends.mkldnn, "matmul", None)):
        found[module] = getattr(module, "fp32_precision", None)
    for name, ask in (("old", torch.get_float32_matmul_precision), ("tf32", lambda: MATMUL.allow_tf32)):
        try:
            found[name] = ask()
        except RuntimeError:  # the two interfaces differ
            found[name] = "error"
    return found


@pytest.fixture
def restored():
    """Leave all settings as they are in a fresh process."""
    yield
    if NEW:
        torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    if NEW:
        MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    MATMUL.allow_bf16_reduced_precision_reduction = MATMUL.allow_fp16_reduced_precision_reduction = True
    if hasattr(MATMUL, "allow_fp16_accumulation"):
        MATMUL.allow_fp16_accumulation = False


def everything():
    torch.set_float32_matmul_precision("medium")
    if hasattr(MATMUL, "allow_fp16_accumulation"):
        MATMUL.allow_fp16_accumulation = True


def new_interface():
    MATMUL.fp32_precision = "tf32"
    MATMUL.allow_bf16_reduced_precision_reduction = False


def both_interfaces():
    torch.set_float32_matmul_precision("high")
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    if hasattr(MATMUL, "allow_bf16_reduced_precision_reduction_split_k"):
        MATMUL.allow_bf16_reduced_precision_reduction = (False, False)


def all_operations():
    torch.backends.fp32_precision = "tf32"


def old_flag():
    MATMUL.allow_tf32 = True


USERS = [lambda: None, everything, old_flag, *([new_interface, both_interfaces, all_operations] if NEW else [])]


@pytest.mark.parametrize("choose", USERS, ids=lambda choose: choose.__name__)
def test_settings_are_pinned_inside_and_the_users_again_outside(choose, restored):
    choose()
    before = settings()
    with full_precision():
        inside = settings()
        assert inside["old"] == "highest" and not inside["tf32"]
        assert not any(inside[name] for name in NAMES[:2]) and not inside["allow_fp16_accumulation"]
        assert not NEW or inside["fp32_precision"] == inside[torch.backends.mkldnn.matmul] == "ieee"
        with full_precision():
            assert settings() == inside
        assert settings() == inside
    assert settings() == before
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert settings() == before
    if NEW:  # what is inherited is inherited again
        torch.backends.fp32_precision = "ieee"
        assert (MATMUL.fp32_precision == "ieee") == (choose in (all_operations, USERS[0]))


def test_threads_that_overlap_leave_the_users_settings(restored):
    torch.set_float32_matmul_precision("high")
    before, first_is_in, second_is_in = settings(), threading.Event(), threading.Event()

    def first():
        with full_precision():
            first_is_in.set()
            assert second_is_in.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    assert first_is_in.wait(10)
    with full_precision():
        second_is_in.set()
        thread.join(10)
        assert settings()["old"] == "highest"  # though the first is out again
    assert settings() == before


def test_the_model_runs_with_the_users_settings_and_the_library_with_its_own(monkeypatch, restored):
    torch.set_float32_matmul_precision("high")
    seen = set()

    def watch(owner, name, who):
        ordinary = getattr(owner, name)

        def watched(*args, **kwargs):
            seen.add((who, torch.get_float32_matmul_precision()))
            return ordinary(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(torch.nn.functional, "embedding", "model")
    watch(TorchBackend, "allocate_mlp", "backend")
    watch(LayerMaps, "down", "sweep")
    dp = DePass(build_model("llama"), backend="torch")
    for options in ({}, {"method": Adjoint(refine=4, sample=4)}):
        for kind in (Neurons(0), Neurons(layers="all")):
            dp.attribute(random_ids(5), kind, **options)
    assert seen == {("model", "high"), ("backend", "highest"), ("sweep", "highest")}
    assert torch.get_float32_matmul_precision() == "high"
