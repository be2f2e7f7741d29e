"""Where a stream comes from: the closed table of tasks."""
