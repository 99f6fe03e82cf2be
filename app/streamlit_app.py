"""The review app: navigation, nothing else. `streamlit run app`, or `harness app`."""

import sys
from pathlib import Path

import streamlit as st

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # so that `app` is a package however Streamlit is started

from app import experiments, queries

st.set_page_config(page_title="harness", layout="wide")
# The pages' folder is not called `pages`: Streamlit would open a deep link into such a folder without this script.
st.navigation(
    {
        section: [
            st.Page(page.file, title=page.title, url_path=address, default=page is experiments.CORE[0])
            for address, page in pages.items()
        ]
        for section, pages in experiments.sections(queries.entries()).items()
    },
    expanded=True,
).run()
