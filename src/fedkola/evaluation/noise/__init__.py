"""Scenes of imperfect data with known truth, and what others do about it, one file each."""
