"""Archives in, tables out, on Ray."""
