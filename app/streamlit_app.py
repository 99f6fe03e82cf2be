"""The review app: navigation, nothing else. `streamlit run app`, or `harness app`."""

import sys
from pathlib import Path

import streamlit as st

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # so that `app` is a package however Streamlit is started

from app.frame import PAGES

st.set_page_config(page_title="harness", layout="wide")
# Not called `pages`: Streamlit would open a deep link into such a folder without this script.
folder = Path(__file__).parent / "views"
st.navigation(
    [
        st.Page(folder / f"{name}.py", title=title, url_path=name, default=name == "runs")
        for name, title in PAGES.items()
    ]
).run()
