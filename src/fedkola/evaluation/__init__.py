"""Tasks, baselines, metrics, tables and the report: what a run is judged by."""
