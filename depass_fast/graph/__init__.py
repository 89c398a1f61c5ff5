"""Graphs: tokens, heads, neurons and features as nodes, and the direct shares between them under a linear rule."""
