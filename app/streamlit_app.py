"""The review app: navigation, nothing else. `streamlit run app`, or `harness app`."""

import sys
from pathlib import Path

import streamlit as st

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # so that `app` is a package however Streamlit is started

st.set_page_config(page_title="harness", layout="wide")
pages = Path(__file__).parent / "pages"
st.navigation(
    [
        st.Page(pages / "runs.py", title="Runs", url_path="runs", default=True),
        st.Page(pages / "pressure.py", title="Pressure", url_path="pressure"),
        st.Page(pages / "answers.py", title="Answers", url_path="answers"),
    ]
).run()
