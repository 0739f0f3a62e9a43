"""What made the embedded models and the rows of their tasks; run from the root of a checkout."""
