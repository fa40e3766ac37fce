"""Shards of tokens: reading, checking, batches, tokenizers."""

from hgpt.cli import needs

needs("train", "psutil", "tiktoken")
