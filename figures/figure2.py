"""Figures 2 and 9: entropy along depth, H^{l-1} -> A^l -> F^l -> H^l, with pi_theta marked.

Reads the directories that `entropylens analyze MODEL -o DIR` writes: a model each, side by side.
"""

from _script import main

if __name__ == "__main__":
    main("2")
