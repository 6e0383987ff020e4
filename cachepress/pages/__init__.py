"""Pages that show what was measured: a report of results, and a context as a press left it."""
