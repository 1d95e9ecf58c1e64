"""`manta chaos`: train while things are killed and broken, and compare the result bit for bit."""
