"""Figure 11: Pass@K of each benchmark, with 95 % over problems.

Reads the directories that `entropylens evaluate MODEL --benchmark NAME -n 300 -o DIR` writes:
a model each.
"""

from _script import main

if __name__ == "__main__":
    main("11")
