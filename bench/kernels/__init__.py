"""Checks of the Triton kernels against float64, and the fused products that they are measured against."""
