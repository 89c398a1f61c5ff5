"""The labels of the two components that the library adds itself."""

REST, BIAS = "rest", "bias"
