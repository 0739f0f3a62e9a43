"""Scripts that generated the embedded models and the rows of their tasks; run them from the root of a checkout."""
