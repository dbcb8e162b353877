"""A small laboratory: a tiny model, a task it can learn, and BuPO beside its baselines on a CPU."""
