"""What acts on a structure from outside: electrodes held at potentials or charges."""
