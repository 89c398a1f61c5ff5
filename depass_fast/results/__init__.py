"""Results: scores with labels, their files and how they look. Importing this room registers every kind of file."""

from . import attribution, layered

__all__ = ["attribution", "layered"]
