"""Models in the shape of OPT have as many zeros as they say."""

from dataclasses import replace

from bench.core.models import SHAPES, build_model, random_prompt
from depass_fast import DePass


def test_biases_leave_the_zeros_of_a_trained_model():
    shape = replace(SHAPES["opt-512"], hidden=128, intermediate=512, layers=2)
    trace = DePass(build_model(shape)).trace(random_prompt(shape, 30).tolist())
    for layer in trace.layers:
        assert abs(float((layer.mlps[0].act == 0).float().mean()) - shape.zeros) < 0.02
