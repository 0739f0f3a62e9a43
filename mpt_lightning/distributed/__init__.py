"""Running on several devices: a strategy for large backbones, agreement between ranks, and runs that are ended."""
