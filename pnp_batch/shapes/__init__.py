"""The built-in model `builtin:shapes` and the scenes it knows."""
