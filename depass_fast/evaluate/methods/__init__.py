"""The scores of tokens, heads and neurons by DePass and by every other method that it is compared with."""
