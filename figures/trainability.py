"""Not in the paper: NLL of pi_l, its agreement with pi_theta, and the cosine of its gradient.

Reads the directories that `entropylens analyze MODEL -o DIR` writes and, for the last row, that
`entropylens train --config NAME --probe-layers -o DIR` writes.
"""

from _script import main

if __name__ == "__main__":
    main("trainability")
