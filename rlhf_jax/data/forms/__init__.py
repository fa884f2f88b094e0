"""Records as others publish them, in our keys: renamed columns, and the table of public forms."""
