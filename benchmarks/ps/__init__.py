"""One step of the data plane, pull + SGD push, against everything else that could carry it."""
