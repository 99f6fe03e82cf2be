"""The stages of amplification, one file each; contents.py lists them."""
