"""One file for each cost term; the file name is the metric name."""
