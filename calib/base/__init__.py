"""What every other room builds on: errors, files, progress, versions. Only ``device`` imports MLX."""

VERSION = "0.2.0"
