"""The rules compared: what the model loses with the components masked, or the tokens deleted, that each ranks high."""
