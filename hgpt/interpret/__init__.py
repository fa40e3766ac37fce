"""Measures of trained models, as functions of arrays, and a report that compares any number of models.

python -m hgpt.interpret runs/harmonic runs/softmax --data data/python_docs --out report/
"""

from hgpt.cli import needs

needs("interpret", "accelerate", "docstring_parser", "jinja2", "matplotlib", "psutil", "scipy", "tiktoken")
