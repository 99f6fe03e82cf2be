"""The browser of a neuron run in a terminal: `harness browse RUN`.

data.py    what is read of a run: its snapshot, and its files mapped into memory
tokens.py  a prompt's tokens as cells that a terminal shows and does not obey
heat.py    activations as colours, or as signs where there are none
panes.py   what stands in each part of the screen, as lines
keys.py    the keys, told once for the program, its help and docs/browser.md
app.py     the screen; the only one of these that knows Textual

Loads no torch. Writes nothing of a run.
"""

from concurrent.futures import ThreadPoolExecutor

from harness.run import RunPaths


def browse(paths: RunPaths) -> int:
    """Show a run on the terminal until it is left; the exit code. Raises HarnessError, one line, for a run with nothing to
    show."""
    from harness.experiments.neurons.browser.data import open_run

    # Both take a quarter of a second, one of them mostly outside of Python.
    with ThreadPoolExecutor(1, thread_name_prefix="open") as pool:
        opening = pool.submit(open_run, paths)
        from harness.experiments.neurons.browser.app import Browser

        run = opening.result()
    return Browser(run).run() or 0
