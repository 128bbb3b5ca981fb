"""Rows of text in, packed batches of tokens out."""
