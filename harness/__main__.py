"""`harness` and `python -m harness`."""

import sys

from harness.terminal import hold_standard_files


def main() -> int:
    """One command, from this process's arguments; its exit code."""
    hold_standard_files()  # before anything opens a file
    from harness import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
