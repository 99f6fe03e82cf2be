"""Semantic gravity: how strongly a prompt pulls toward a word, how often a ban on it fails, and what explains it."""
