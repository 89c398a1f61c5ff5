"""The race: which neurons a logit depends on, by ablation, gradient and DePass. ``python -m bench.ablation``."""
