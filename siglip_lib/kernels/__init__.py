"""Kernels in Triton. Importing this imports none of them: each is imported where it is used."""
