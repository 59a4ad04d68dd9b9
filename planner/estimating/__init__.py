"""`leanplan estimate` for people: where time and memory go, two plans side by side, a sweep, and the machine's roofline."""
