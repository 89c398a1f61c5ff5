"""The tests mirror the house; tests/support holds what several of them use."""
