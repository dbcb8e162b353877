"""Write the golden images anew: `python tests/plots/regenerate.py [NAME...]`. Look at them then."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from specimens import CASES, render  # noqa: E402

for name in sys.argv[1:] or CASES:
    render(name, HERE / "golden" / f"{name}.png")
