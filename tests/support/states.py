"""States that meet every corner, and the comparison of two states."""

import torch


def close(a, b, tolerance=1e-5):
    """True if scores or states agree, relative to the largest value."""
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def corner_states(trace, layer=1):
    """Components that meet every corner: absent ones, duplicates, opposite ones, one that is all of x."""
    x = trace.resid(layer)
    n = len(x)
    states = torch.zeros(n, 5, x.shape[1])
    states[:, 0] = x
    states[n // 2 :, 1] = x[n // 2 :]
    states[n // 2 :, 2] = -x[n // 2 :]
    states[0, 3] = 2 * x[0]
    return states
