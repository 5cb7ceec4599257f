"""KV layouts: dense and paged."""
