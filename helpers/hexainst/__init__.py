"""The data set: rows, their checkers, and how the human half is built."""
