"""The instrument: it finds neurons and experts, counts them exactly, and takes them out. It could
be installed alone.
"""
