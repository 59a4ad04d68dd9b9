"""One file for each probe of this machine."""
