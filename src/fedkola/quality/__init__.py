"""Imperfect data: which records are usable, and noise for tests."""
