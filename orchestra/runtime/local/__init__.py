"""The in-process PyTorch engine; importing this package loads nothing, `engine` brings torch and transformers."""
