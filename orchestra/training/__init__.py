"""Demonstrations and training. Importing this package loads neither torch nor transformers."""
