"""Agreement and faithfulness: the adjoint sweep, groups of neurons, ablation, and the families."""
