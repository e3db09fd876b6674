"""The options of the config group ``analysis``: bit-widths from statistics or sensitivities, one rule a module."""
