"""A containerized, reproducible experiment harness for language-model interpretability."""
