"""Figures 4 and 7: reward, entropy of pi_theta and response length over the steps of training.

Reads the directories that `entropylens train --config NAME -o DIR` writes:
a run each.
"""

from _script import main

if __name__ == "__main__":
    main("4")
