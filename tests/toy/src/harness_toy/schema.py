"""The tables of surprisal."""

from harness.store import Schema, TableFacts

# Numbered from 1. Never edit one that was released: append another.
MIGRATIONS = (
    """
    CREATE TABLE texts (text_id VARCHAR PRIMARY KEY, text VARCHAR, token_ids INTEGER[]);
    CREATE TABLE surprisals (text_id VARCHAR PRIMARY KEY, num_tokens INTEGER, mean DOUBLE);
    """,
)

SCHEMA = Schema(
    "toy",
    MIGRATIONS,
    facts=TableFacts(orphans={"surprisals": "SELECT text_id FROM surprisals ANTI JOIN texts USING (text_id)"}),
)
