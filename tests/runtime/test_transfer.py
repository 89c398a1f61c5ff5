"""Copies between the host and a device."""

import pytest
import torch

from depass_fast.runtime.transfer import to_device


@pytest.mark.parametrize(
    ("device", "size", "waits", "pins"),
    [
        ("cuda:1", 9, False, False),
        ("cuda:1", 1 << 20, False, True),
        ("mps", 1 << 20, True, False),
        ("cpu", 9, True, False),
    ],
)
def test_only_a_gpu_of_nvidia_or_amd_is_sent_host_memory_without_waiting(device, size, waits, pins):
    """CUDA copies some pageable memory aside, and only it; of more, what is pinned."""

    class Recorder:
        device, nbytes, pinned = torch.device("cpu"), size, False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking=False):
            return device, not non_blocking, self.pinned

    assert to_device(Recorder(), torch.device(device)) == (torch.device(device), waits, pins)
