"""A small laboratory: a tiny model, a task it can learn, and BuPO beside its baselines on a CPU."""

import bupo.plugin  # noqa: F401  (veRL settles on a platform when it is first asked)
