"""One command a file: its work, from resolved settings to what is printed. Knows no experiment by name."""
