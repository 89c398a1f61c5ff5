"""Models, timing, peaks of memory, result files and Markdown for every other room. This room imports none of them."""
