"""Folders, label maps and phantoms: what a case is, nothing of how it is read."""
