"""Queries, keys and values -> their attention; the scores never leave the chip."""
