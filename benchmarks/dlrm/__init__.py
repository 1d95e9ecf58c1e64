"""DLRM on Criteo-like data: a Manta job against TensorFlow in one process, on the same machine."""
