"""Weights of other formats in, Hugging Face folders out.

One module a format, each with `load(path) -> (DecoderConfig, params)`: `gguf`, `llama2c`,
`huggingface`; the first two also have `load_tokenizer(path)`, the last `export(directory, ...)`.
Parameters come back as host (numpy) arrays: place them with `jax.device_put` and a sharding.
"""
