"""The race: the neurons that a logit depends on, by ablation, gradient and DePass."""
