"""Passes for the KV cache, positions and attention masks of prefill and decode."""
