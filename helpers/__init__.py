"""SPARCOM: which neurons and experts of a language model serve which kind of instruction."""
