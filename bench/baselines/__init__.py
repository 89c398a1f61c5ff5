"""The opponents: the published algorithm, ablation, attribution patching, and the providers made of them."""
