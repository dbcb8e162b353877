"""Table 1: Avg@K a model and benchmark, best bold and second underlined; CSV, Markdown, LaTeX.

Reads the directories that `entropylens evaluate MODEL --benchmark NAME -o DIR` writes: a model
each.
"""

from _script import main

if __name__ == "__main__":
    main("table1")
