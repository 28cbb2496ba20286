"""What a cut does to the outputs, and the weights that make up for it: closed forms, no training."""
