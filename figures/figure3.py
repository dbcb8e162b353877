"""Figures 3 and 10: entropy change of attention (above) and FFN (below), 95 %, same-norm control.

Reads the directories that `entropylens analyze MODEL -o DIR` writes: a model each, side by side.
"""

from _script import main

if __name__ == "__main__":
    main("3")
