"""Make a plan from statistics: bit-widths, clipping and activation ranges of every layer."""
