"""Speed: on a CPU, on a GPU, over layers and prompts, and of single kernels."""
