"""Handle leaves, names, dtypes, devices and checks, for every other folder."""
