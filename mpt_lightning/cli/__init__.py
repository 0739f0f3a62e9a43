"""`mpt`: the command line."""
