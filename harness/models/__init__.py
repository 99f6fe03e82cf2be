"""Everything that touches torch and transformers; knows no run, store or stage.

Dimension key of the project: B batch · T token position (query) · S key position · L layer · D residual width ·
H head · K head width · V vocabulary · N rows pooled · R rows of a forward.
"""
