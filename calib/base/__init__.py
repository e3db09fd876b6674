"""What every room stands on: errors, files, progress, versions. Imports nothing else of calib, and no MLX at import."""
