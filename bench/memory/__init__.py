"""Predictions of the planner beside measured and counted memory, and the peak of a single provider."""
