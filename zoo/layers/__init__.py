"""Dense building blocks: one paper concept a file."""
