"""The KV cache: what a layer keeps per token (specs), the pages, the prefix tree over them, and the tensors
(pool)."""
