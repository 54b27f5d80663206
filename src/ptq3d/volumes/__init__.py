"""Volumes on their grids: files, geometry, preprocessing."""
