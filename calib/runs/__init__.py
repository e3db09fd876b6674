"""Run directories: what a job was asked, how it went, what it made; comparisons of them, and pages."""
