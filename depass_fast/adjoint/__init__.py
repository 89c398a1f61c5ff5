"""The adjoint sweep (docs/adjoint.md): every neuron's score at the price of a few forward passes."""
