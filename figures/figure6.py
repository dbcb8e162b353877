"""Figure 6: Pass@K averaged over the benchmarks, with 95 % over problems.

Reads the directories that `entropylens evaluate MODEL --benchmark NAME -n 300 -o DIR` writes,
on the same benchmarks: a model each.
"""

from _script import main

if __name__ == "__main__":
    main("6")
