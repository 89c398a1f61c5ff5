"""A folder for the module search path: its package `DePass` is what published scripts import."""
