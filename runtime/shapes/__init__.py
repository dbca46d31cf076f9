"""Extents, points, regions, and the trait that every mesh shares: named dimensions and strided views. Pure."""
