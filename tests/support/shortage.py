"""Memory that runs out."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Shortage(TorchDispatchMode):
    """Fails the ``at``-th operation on tensors, once; ``count`` is how many there were."""

    def __init__(self, at: int, error: Exception | None = None):
        super().__init__()
        self.count, self.at = 0, at
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise self.error
        return function(*args, **(kwargs or {}))
