"""Build the seven optimizers of TF1, clip gradients, and schedule the learning rate."""
