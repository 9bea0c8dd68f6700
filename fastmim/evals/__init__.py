"""What frozen features are worth: generators of (name, value). Each takes features and labels, no files."""
