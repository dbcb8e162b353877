"""Figure 5: cos(H^l, H^m) for higher layers m, Delta H of layer l, and perplexity, over steps.

Reads the directories that `entropylens train --config NAME -o DIR` writes
with bupo.analyze_every=K: a run each.
"""

from _script import main

if __name__ == "__main__":
    main("5")
