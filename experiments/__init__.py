"""One module a recipe; `python -m experiments` lists them. They run from a checkout."""
