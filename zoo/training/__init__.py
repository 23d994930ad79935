"""Training from a config: the Lightning module, its data, optimizer, callbacks and run directory."""
