"""`mpt demo`: the whole method on embedded models and tasks. The models and rows were made by `tools/`."""
