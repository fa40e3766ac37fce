from hgpt.cli import needs  # hgpt first: Ctrl-C then ends the imports without a traceback

needs("data", "psutil", "pyarrow", "tiktoken")
