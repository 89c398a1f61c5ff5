"""The paper's experiments, and the checks that it left open, on any supported model: one study, one command."""
