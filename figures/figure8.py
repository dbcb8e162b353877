"""Figure 8: residual cosine similarity of what attention and FFN write.

Reads the directories that `entropylens analyze MODEL -o DIR` writes: a model each, side by side.
"""

from _script import main

if __name__ == "__main__":
    main("8")
