"""Attention over segments of keys: plan and kernels, free of any engine's types."""
