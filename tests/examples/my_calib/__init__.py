"""A package of one's own, with options for calib: see docs/ARCHITECTURE.md."""
