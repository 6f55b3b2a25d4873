"""Experiments, the runs they consist of, statistics and the report."""
