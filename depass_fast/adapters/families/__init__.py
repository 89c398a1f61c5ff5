"""One file per model family. Every file here is found by itself."""
