"""Results: scores with labels, their files and how they look. Importing this room registers every kind of file."""

from . import attribution, generation, layered

__all__ = ["attribution", "generation", "layered"]
