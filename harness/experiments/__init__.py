"""Experiments: what each gives is a package of its own, found by its name in the registry."""
