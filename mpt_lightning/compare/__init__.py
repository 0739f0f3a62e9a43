"""`mpt compare`: run methods x tasks x shots x seeds from one YAML file through the command line, and report them."""
