"""Shards of tokens: reading, checking, batches, tokenizers."""
