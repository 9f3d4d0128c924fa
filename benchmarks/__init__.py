"""Speed and memory, always as a ratio against a named baseline measured in the same process."""
