"""Sparse attention: an indexer selects the keys that a query may see, beside the causal mask. The selection is frozen.

DeepSeek 3.2 and GLM-5 announce the selected positions in their attention call, and their indexers read the mask of the
forward pass, which other models leave out where the attention function is ours. MiniMax M3 announces blocks of
positions, for every group of heads. Qwen 4 announces nothing: its selection is in the mask.
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
    """Return selected positions (N, ..., k) of one prompt as a trace keeps them: (N, ..., width) int32, -1 for none."""
    return nn.functional.pad(indices.to(torch.int32), (0, width - indices.shape[-1]), value=-1)


def seen_in(mask: Tensor, width: int) -> Tensor:
    """Return the positions that queries of one prompt see by a mask (1, 1, N, N), at most ``width``: (1, N, k).

    The mask is True where a key is seen, or zero, if it is added to the logits, as it may be in eager attention.
    """
    positions = torch.arange(mask.shape[-1], device=mask.device)
    seen = mask if mask.dtype == torch.bool else mask == 0
    return torch.where(seen[:, 0], positions, -1).topk(min(width, mask.shape[-1])).values


def by_query(indices: Tensor) -> Tensor:
    """Return what a call announces of one prompt, (1, N, k) positions or (1, G, N, k) blocks: (N, k) or (N, G, k)."""
    return indices[0] if indices.ndim == 3 else indices[0].transpose(0, 1)


def selected(chosen: Tensor, n_keys: int) -> Tensor:
    """Return where queries may see one of the first ``n_keys`` positions: (..., K) positions -> (..., n_keys) bool."""
    at = torch.where((chosen < 0) | (chosen >= n_keys), n_keys, chosen).long()
    seen = torch.zeros(*chosen.shape[:-1], n_keys + 1, dtype=torch.bool, device=chosen.device)
    return seen.scatter_(-1, at, True)[..., :n_keys]


def seen_by_heads(chosen: Tensor, n_keys: int, block: int | None, n_heads: int) -> Tensor:
    """Return where the queries of every head may see one of the first ``n_keys`` positions.

    ``chosen`` are positions (..., Q, K), the same for all heads: (..., 1, Q, n_keys). With a size of a ``block`` they
    are blocks for each of G groups of heads, (..., Q, G, K): (..., H, Q, n_keys).
    """
    if block is None:
        return selected(chosen, n_keys)[..., None, :, :]
    blocks = selected(chosen, -(-n_keys // block)).transpose(-2, -3)  # (..., G, Q, n_blocks)
    seen = blocks.repeat_interleave(block, -1)[..., :n_keys]
    return seen.repeat_interleave(n_heads // seen.shape[-3], -3)
