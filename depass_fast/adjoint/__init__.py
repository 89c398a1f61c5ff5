"""The adjoint sweep (DESIGN.md section 4): every neuron's score at the price of a few forward passes."""
