"""Attributions of many prompts: batches by planned cost, shards that survive, many processes."""
