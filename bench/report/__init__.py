"""The results page and its pictures, made from result files."""
