"""One file a stage of semantic gravity; `contents.py` beside this folder lists them in the order of running."""
