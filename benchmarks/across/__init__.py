"""What is about all benchmarks: the list of their results, the tables of the documentation, two commits."""
