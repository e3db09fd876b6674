"""DiffusionKit's MMDiT, of SD3, FLUX and the emoji model, as calib sees a transformer."""
