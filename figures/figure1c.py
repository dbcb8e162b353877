"""Figure 1c: exploration, integration and convergence of the FFNs, as bars of Delta H with 95 %.

Reads the directories that `entropylens analyze MODEL -o DIR` writes: a model each, side by side.
"""

from _script import main

if __name__ == "__main__":
    main("1c")
