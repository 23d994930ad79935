"""Beginning a new family: what the existing ones can read of its config.json, and files to start from."""
