"""Checks of the kernels without Python and torch: see README.md."""
