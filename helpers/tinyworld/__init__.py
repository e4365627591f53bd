"""An example data set and the two pairs trained on it; not the method."""
