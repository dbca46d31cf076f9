"""Torch process groups and device meshes along the dimensions of a mesh. The only folder that needs torch."""
