"""`mpt compare`: methods x tasks x shots x seeds from one YAML file, as runs of the command line, and their tables."""
