"""Leaves, names, numbers, devices and checks: what every wing stands on."""
