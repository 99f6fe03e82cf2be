"""Faults at exactly one system call of a real run, and what becomes of the run: `python -m tests.faults --help`.

`inject.c` counts the calls that change files of a run and kills or refuses one of them; `injector.py` builds and arms it.
`lives.py` forks commands from a process that has imported everything. `experiment.py` is the run that is disturbed and
what its end is held against. `kills.py`, `storage.py`, `processes.py` and `memory.py` each disturb it in one way.
"""
