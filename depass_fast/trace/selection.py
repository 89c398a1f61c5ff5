"""Sparse attention: an indexer selects the keys that a query may see, beside the causal mask. The selection is frozen.

DeepSeek 3.2 and GLM-5 announce the selected positions in their attention call, and their indexers read the mask of the
forward pass, which other models leave out where the attention function is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def register_with_mask(name: str, attention_function: object) -> None:
    """Register an attention function under ``name`` so that transformers also makes its mask."""
    ALL_ATTENTION_FUNCTIONS.register(name, attention_function)  # type: ignore[arg-type]
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    except ImportError:  # older versions have no model that selects keys
        return
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)  # True where a query sees a key


def padded_to(width: int, indices: Tensor) -> Tensor:
    """Return selected positions (1, N, k) of one prompt as a trace keeps them: (N, width) int32, -1 for none."""
    return nn.functional.pad(indices[0].to(torch.int32), (0, width - indices.shape[-1]), value=-1)


def selected(chosen: Tensor, n_keys: int) -> Tensor:
    """Return where queries may see one of the first ``n_keys`` positions: (..., K) positions -> (..., n_keys) bool."""
    at = torch.where((chosen < 0) | (chosen >= n_keys), n_keys, chosen).long()
    seen = torch.zeros(*chosen.shape[:-1], n_keys + 1, dtype=torch.bool, device=chosen.device)
    return seen.scatter_(-1, at, True)[..., :n_keys]
