"""PRIVATE PRE-TRAINING: what leaves a site."""
