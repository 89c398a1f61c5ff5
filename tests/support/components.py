"""Components of every kind, and a dictionary of features."""

from types import SimpleNamespace

import torch

from depass_fast import Custom, DePass, Features, Heads, Modules, Neurons, Subspaces, Tokens


def kinds(length: int, d: int = 32, mid: int | None = None) -> dict:
    """Every kind of component by a label, for a prompt of ``length`` tokens and a model of width ``d``.

    ``mid`` is the width between attention and MLP, where that is another one."""
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens@0": Tokens(),
        "tokens@1": Tokens(1),
        "heads@0": Heads(0),
        "heads@last": Heads(-1),
        "modules@1": Modules(1),
        "attention@0": Modules(0, which="attention"),
        "mlp@last": Modules(-1, which="mlp"),
        "neurons@0": Neurons(0),
        "neurons@last": Neurons(-1),
        "subspaces@1": Subspaces(1, [torch.eye(d)[:, :3], torch.eye(d)[:, 5:9]]),
        "features@1": Features(1, Dictionary(size=12, width=d), "resid_post"),
        "custom@1": Custom(1, torch.randn(length, 4, d, generator=generator)),
        "custom-mid@0": Custom(0, torch.randn(length, 2, mid or d, generator=generator), site="resid_mid"),
    }


def custom(dp: DePass, ids: list[int], layer: int = 1, site: str = "resid_pre", scale: float = 0.1, m: int = 6):
    """``m`` random components, small enough for the adjoint sweep to be close."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(len(ids), m, dp.adapter.hidden_size, generator=generator, dtype=torch.float64)
    return Custom(layer, scale * states, site=site)


class Dictionary:
    """A random dictionary with ReLU. ``normalise`` divides its inputs by their norm and scales back what it decodes."""

    def __init__(self, size=24, width=32, normalise=False, hook=None, dtype=torch.float32, bias=0.3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
        self.W_enc, self.W_dec, self.b_dec = draw(width, size), draw(size, width) / width, bias * draw(width)
        self.b_enc, self.normalise = -4 * draw(size).abs(), normalise
        if normalise:
            self.b_enc *= 0.2
        self.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name=hook))

    def encode(self, x):
        self.norm = x.norm(dim=-1, keepdim=True) if self.normalise else 1
        return torch.relu((x / self.norm - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, activations):
        norm, self.norm = self.norm, None
        return (activations @ self.W_dec + self.b_dec) * norm


def is_there(dp: DePass, kind) -> bool:
    """True unless the kind is of heads or neurons of a layer that has none."""
    layer = kind.resolve(dp.adapter)
    heads, neurons = dp.adapter.has_attention(layer), dp.adapter.has_mlp(layer)
    lacks = {"attention": not heads, "mlp": not neurons}.get(getattr(kind, "which", ""), False)
    return not lacks and {"heads": heads, "neurons": neurons}.get(kind.kind, True)
