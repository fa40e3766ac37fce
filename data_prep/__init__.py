import hgpt  # noqa: F401  (first: Ctrl-C then ends the imports without a traceback)
