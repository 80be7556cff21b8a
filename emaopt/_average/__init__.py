"""The average of the parameters."""
