"""Arrays in, arrays out: sets, similarity, nulls, tests. Nothing here opens a model or a file."""
