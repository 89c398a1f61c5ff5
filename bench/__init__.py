"""Benchmarks and studies; README.md lists the rooms and the commands."""
