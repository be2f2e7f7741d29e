"""Knowledge that arrives, differs, ages and leaves: streams, cells, views, routing, removal."""
