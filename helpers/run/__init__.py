"""The command line, the chain of notebooks, and what the repository says of itself."""
