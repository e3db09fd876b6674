"""Reconstruction block by block: a block is trained until its output is the full model's again."""
