"""A GGUF file of a small model, written as llama.cpp's converter does; needs the package gguf."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import nn

NEEDED = ("gguf", "accelerate")
FIRST = 33  # "!", the character of id 2; "CAB" is [36, 34, 35]
needs_gguf = pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}")


def write_gguf(path: Path, model: nn.Module, architecture: str = "llama", left_out: str | None = None) -> Path:
    """Write a Llama of 64 tokens, with a tokenizer of characters, and without a tensor if one is named."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *(chr(FIRST + i) for i in range(60)), '!"', "#$"])
    writer.add_token_types([3, 3] + [1] * 62)
    writer.add_token_merges(['! "', "# $"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        module, _, ending = name.rpartition(".")
        if name == left_out:
            continue
        for projection, count in heads.items():
            if module.endswith(projection):  # the two halves of a rotated head are interleaved
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{names.get_name(module)}.{ending}", tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
