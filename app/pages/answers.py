"""What the model answered, and where the word is in it."""

import streamlit as st

from app import queries

_SQL = """
SELECT p.category, p.question, p.target, c.condition, c.mode, c.sample_id, c.answer, d.word_present, d.format_ok,
       d.num_occurrences, d.char_spans, c.finish_reason, c.prompt_id
FROM completions c JOIN prompts p USING (prompt_id)
LEFT JOIN detections d USING (prompt_id, condition, mode, sample_id)
WHERE c.condition = ? AND c.mode = ? AND (? = 'any' OR coalesce(d.word_present::VARCHAR, '') = ?)
ORDER BY c.prompt_id, c.sample_id LIMIT 2000
"""

st.title("Answers")
entry = queries.choose_run()
if entry:
    conditions = queries.query(entry.paths, "SELECT DISTINCT condition FROM completions ORDER BY condition")
    if conditions is not None and conditions.empty:
        st.info("No answer has been generated yet.")
    elif conditions is not None:
        left, middle, right = st.columns(3)
        names = list(conditions["condition"])
        wanted = st.query_params.get("condition", "negative")
        condition = left.selectbox("Condition", names, index=names.index(wanted) if wanted in names else 0)
        st.query_params["condition"] = condition
        mode = middle.selectbox("Mode", ["sample", "greedy"])
        present = right.selectbox("Says X", ["any", "true", "false"])
        rows = queries.query(entry.paths, _SQL, condition, mode, present, present)
        if rows is not None:
            st.caption(f"{len(rows):,} answers" + (" (the first 2,000)" if len(rows) == 2000 else ""))
            st.dataframe(rows, hide_index=True, width="stretch")
