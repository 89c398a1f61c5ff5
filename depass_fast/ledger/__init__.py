"""The ledger: under a linear rule, one way back through the layers gives every component's exact score."""
