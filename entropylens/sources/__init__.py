"""The front doors: whatever a user calls a model becomes a `Subject`."""
