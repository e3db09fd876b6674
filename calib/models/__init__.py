"""Models: DiffusionKit's SD3 and FLUX and the shipped emoji model, behind one interface."""
