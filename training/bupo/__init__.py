"""The BuPO plug-in for veRL: InterGRPO for `internal_steps` steps, then GRPO (Eq. 11)."""
