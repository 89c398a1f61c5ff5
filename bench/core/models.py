"""Random models in the shapes of real ones, their prompts, and the floor of a decomposition's arithmetic.

**Floor** (DESIGN.md section 5). One row (a component at a position) through one layer costs
``2·D·(d_kv + H·d) + 4·D·I`` FLOP: V and O, then gate and down. The floor counts the rows that can be non-zero, in the
layers that they pass; in the last layer only those at the position that is read. It leaves out the product with the
attention probabilities and the forward pass. All providers' rates are *useful* rates: this same floor over their time.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

Model = Any  # a model of transformers: its layers and projections are attributes that no type checker knows


@dataclass(frozen=True)
class Shape:
    """A Llama, or another family of that layout, with random weights.

    ``zeros`` is the share of activations that are exactly zero, of a model with ReLU: biases see to it.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 1024
    model_type: str = "llama"
    zeros: float = 0.5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def flops_per_row(self) -> int:
        """FLOP of one row through one layer."""
        width = self.head_dim * (self.kv_heads + self.heads)
        return 2 * self.hidden * width + 4 * self.hidden * self.intermediate


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-512", 512, 1408, 6, 8, 8),  # small, for a CPU
        Shape("llama-tiny", 64, 96, 3, 4, 2, vocabulary=64),
        Shape("smollm2-135m", 576, 1536, 30, 9, 3),
        Shape("llama-2-7b", 4096, 11008, 32, 32, 32, vocabulary=32000),
        Shape("llama-3.1-8b", 4096, 14336, 32, 32, 8, vocabulary=128256),
        Shape("qwen2-7b", 3584, 18944, 28, 28, 4, vocabulary=152064, model_type="qwen2"),
        Shape("pythia-6.9b", 4096, 16384, 32, 32, 32, vocabulary=50432, model_type="gpt_neox"),
        Shape("gemma-2-9b", 3584, 14336, 42, 16, 8, vocabulary=256000, model_type="gemma2"),
        # a quarter of OPT-6.7B's layers, with the zeros of a trained one
        Shape("opt-6.7b", 4096, 16384, 8, 32, 32, vocabulary=50272, model_type="opt", zeros=0.95),
        Shape("opt-512", 512, 2048, 4, 8, 8, model_type="opt", zeros=0.95),
    )
}


def config_of(shape: Shape) -> PretrainedConfig:
    """The config of a model of this shape."""
    named = {"ffn_dim": shape.intermediate, "word_embed_proj_dim": shape.hidden} if shape.model_type == "opt" else {}
    return AutoConfig.for_model(
        shape.model_type,
        **named,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


def build_model(
    shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, device: str | torch.device = "cpu"
) -> Model:
    """A random model of this shape, with eager attention (the published implementation needs it)."""
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # built in its own dtype: a 7B model in float32 first would take twice the memory
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config_of(shape), attn_implementation="eager").to(dtype).eval()
            return _quietened(model, shape)
    finally:
        torch.set_default_dtype(usual)


@torch.no_grad()
def _quietened(model: Model, shape: Shape) -> Model:
    """The model with biases of `fc1` that leave as many zeros as the shape says, in place.

    A pre-activation is a row of the weight times a normed state of length √D: nearly normal, of a known deviation.
    """
    quantile = NormalDist().inv_cdf(shape.zeros)
    for name, bias in model.named_parameters():
        if name.endswith("fc1.bias"):
            weight = model.get_parameter(name.replace("bias", "weight"))
            bias.fill_(-quantile * float(weight.float().std() * shape.hidden**0.5))
    return model


def family_model(model_type: str, **config: object) -> Model:
    """A random model of a family in float32, of a vocabulary of 64, with random norm weights and biases."""
    made = AutoConfig.for_model(model_type, vocab_size=64, **config)
    torch.manual_seed(0)
    return randomised(AutoModelForCausalLM.from_config(made).eval())


@torch.no_grad()
def randomised(model: Model) -> Model:
    """The model with random norm weights and biases, in place: transformers initialises them to ones and zeros."""
    # of routers, and of layers (Gemma 4)
    corrections = [named for named in model.named_buffers() if named[0].endswith(("correction_bias", "layer_scalar"))]
    for name, parameter in [*model.named_parameters(), *corrections]:
        if name.endswith("bias"):  # those of all experts have two dimensions
            parameter.normal_(0.0, 0.3)
        elif parameter.ndim == 1:
            parameter.normal_(1.0, 0.3)
        elif (name.endswith("gate.weight") and not parameter.any()) or name.endswith("preact.weight"):
            parameter.normal_(0.0, 0.2)  # gates that begin as zeros (xLSTM)
    for module in model.modules():  # routers by hashes of tokens (DeepSeek V4)
        if hasattr(module, "tid2eid"):
            table = module.tid2eid
            table.copy_(torch.rand(len(table), module.num_experts).topk(table.shape[1]).indices)
    return model


def random_prompt(shape: Shape, length: int, seed: int = 1) -> torch.Tensor:
    """Random ids (N,)."""
    return torch.randint(0, shape.vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def live_rows(shape: Shape, components: str, length: int, layer: int = 0) -> tuple[int, int, int]:
    """Rows in a full layer, rows in the last layer (read at the last position), and the number of layers passed."""
    if components == "tokens":
        return length * (length + 1) // 2, length, shape.layers - layer
    count = {"neurons": shape.intermediate, "heads": shape.heads}[components] + 1  # rest
    return length * count, count, shape.layers - layer - (components == "neurons")


def floor_flops(shape: Shape, components: str, length: int, layer: int = 0) -> int:
    """The floor of one attribution at the last position, in FLOP (see the module)."""
    rows, last, layers = live_rows(shape, components, length, layer)
    if not layers:
        return 0
    # heads start after the attention of their layer
    skipped = rows * (shape.flops_per_row - 4 * shape.hidden * shape.intermediate) if components == "heads" else 0
    return ((layers - 1) * rows + last) * shape.flops_per_row - (skipped if layers > 1 else 0)
