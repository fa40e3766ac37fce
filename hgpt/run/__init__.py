"""A training run: settings, engines, checkpoints, reporting."""

from hgpt.cli import needs

needs("train", "accelerate", "psutil", "tiktoken")
