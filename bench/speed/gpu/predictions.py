"""Goals and predictions of the GPU workloads: data, which the report puts beside what was reached.

A goal is a share of the GEMM rate that the same run measured at the same products, or seconds on an H200. Memory of an
H100 is slower (3.0 TB/s against 4.1): a goal in seconds is one for the H200 alone. ``why`` says what holds a workload
that misses its goal; whoever measures anew writes it anew.
"""

from __future__ import annotations

from dataclasses import dataclass

H200 = "NVIDIA H200"


@dataclass(frozen=True)
class Goal:
    """A workload's goal: at least ``of_gemm``, or at most ``seconds`` on an H200; what is predicted of it, and why."""

    workload: str
    model: str = "llama-2-7b"
    of_gemm: float | None = None
    seconds: float | None = None
    predicted: str = "-"
    why: str = "-"

    def text(self) -> str:
        """The goal in words."""
        return f"≥ {self.of_gemm:.0%} of GEMM" if self.of_gemm is not None else f"≤ {self.seconds:.2f} s on an H200"

    def reached(self, device: str, seconds: float, of_gemm: float) -> bool | None:
        """True if a measurement reaches the goal; None where the goal is for another card."""
        if self.of_gemm is not None:
            return of_gemm >= self.of_gemm
        assert self.seconds is not None
        return seconds <= self.seconds if device == H200 else None


GOALS = (
    Goal(
        "neurons of layer 0, N=20",
        of_gemm=0.88,
        predicted="`allocate` pipelined: -0.10 s; O added by its product: -0.064 s; both beside other GEMMs",
        why="H100: products 2.29 s, in float16 5 % slower than in bfloat16, whose rate is the measure; kernels that "
        "move memory beside them 0.49 s, and their floor is 0.41. Two streams gained nothing (a GEMM takes every "
        "multiprocessor), nor did more stages of `allocate`, nor 8 GiB of workspace. In bfloat16, with O added by its "
        "product, eight layers are 11 % faster",
    ),
    Goal(
        "tokens, N=512",
        of_gemm=0.85,
        predicted="O added by its product, two streams",
        why="as above; `mix` at 82 TFLOP/s; storing P gained 5 %, two streams nothing",
    ),
    Goal(
        "tokens, N=2048",
        of_gemm=0.80,
        predicted="P stored per layer (268 MB): `mix` spends about 2 s making it again",
        why="as N=512, and `mix` has four times the keys; a first call, compilation included",
    ),
    Goal(
        "tokens, N=20, 64 prompts",
        seconds=0.20,
        predicted="4,217 launches, of which 1,344 go prompt by prompt in the last layer",
        why="half as many launches are left, 1,203 of them the model's own; an H100 is busy for 0.24 s. Since then a "
        "layer takes 17 launches in the place of 22, and 21 for the forward pass in the place of 37: 1,400 beside "
        "attention (counted, not yet measured on a card; expected on an H100: 0.27 s)",
    ),
    Goal(
        "heads of all layers, N=20",
        seconds=0.15,
        predicted="3,615 launches; 35 for every layer's starting states",
        why="three quarters of them are left, 1,203 the model's own; an H100 is busy for 0.18 s and waits else. Since "
        "then a layer takes 35 launches in the place of 45, and 21 for the forward pass in the place of 37: 1,900 "
        "beside attention (counted, not yet measured on a card; expected on an H100: 0.25 s)",
    ),
    Goal(
        "all neurons, adjoint, refine 1,000, N=20",
        seconds=0.15,
        predicted="17,667 launches, of which 7,500 share among the crowd: one kernel",
        why="6,900 launches were left; an H100 is busy for 0.16 s and waits for the host for 0.3 s. The search for "
        "loud components made them 7,500, of which 3,600 are left (counted, not yet measured on a card; expected on "
        "an H100: 0.30 s)",
    ),
    Goal(
        "heads of all layers, N=20",
        "qwen2-7b",
        seconds=0.15,
        predicted="the floor of its products is 0.084 s",
        why="H200: one call was timed, and its host was slow; no longer slower than Llama-2-7B's. Since then a layer "
        "takes 43 launches in the place of 53, and 21 for the forward pass in the place of 37 (counted, not yet "
        "measured on a card; expected on an H100: 0.18 s)",
    ),
    Goal("tokens, N=512", "llama-3.1-8b", of_gemm=0.85, why="as in the shape of Llama-2-7B"),
)
