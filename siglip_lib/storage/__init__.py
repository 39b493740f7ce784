"""Tensors on disk and on the hub: found, read, named, checked against a model, written whole or not at all."""
