"""Data: named sources, records, tokenizers, chat templates, packing and the input pipeline.

Import the modules themselves (`from jaxdistill.data import sources`): only `pipeline` imports
grain, so reading a file or rendering a chat needs nothing heavy.
"""
