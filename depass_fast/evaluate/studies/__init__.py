"""The studies: each prepares its items, measures one at a time, and sums up."""
