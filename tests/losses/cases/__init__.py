"""One module a family of losses, each with the tuple `CASES`."""
