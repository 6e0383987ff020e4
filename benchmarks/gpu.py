"""Measures presses on a GPU within some minutes, the most important first; writes docs/gpu.md.

PYTHONPATH=. python benchmarks/gpu.py --minutes 6     # as much as the minutes hold
PYTHONPATH=. python benchmarks/gpu.py kernel parity   # these sections; others stay as they were
PYTHONPATH=. python benchmarks/gpu.py --tiny          # tiny shapes on a CPU, about a minute
PYTHONPATH=. python benchmarks/gpu.py --page          # nothing is run, the page is written again

Python, torch, Triton and transformers are enough. The JSON is written after every figure, so that a
run that is killed keeps what it has.
"""

from benchmarks.card.command import main

if __name__ == "__main__":
    main(__doc__)
