"""The seven optimizers of TF1, clipping, and the learning rate."""
