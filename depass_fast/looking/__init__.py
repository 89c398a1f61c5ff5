"""Attention's own book: why heads look where they look (DESIGN.md section 9)."""
