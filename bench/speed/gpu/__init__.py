"""Speed and memory on a GPU: ``python -m bench.speed.gpu``."""
