"""How keys, values and latent rows are stored, one file a format; `--kv-cache-dtype` takes its name."""
