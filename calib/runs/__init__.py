"""Run directories: configuration, state and results of a job; comparisons of runs, and pages."""
