"""ParScale: one backbone, P learned streams computed side by side, aggregated per token (arXiv:2505.10475)."""
