"""HTML pages: a report of results, and a view of the tokens that a press keeps."""
