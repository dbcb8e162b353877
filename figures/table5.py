"""Table 5: hyperparameters of runs, from their resolved configurations; CSV and Markdown.

Reads the directories that `entropylens train --config NAME -o DIR` writes:
a run each.
"""

from _script import main

if __name__ == "__main__":
    main("table5")
