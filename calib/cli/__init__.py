"""The command line; nothing below knows Hydra."""
