"""Tables, rows and shards: everything that holds or reads embedding state.

The bottom layer. It imports neither `workers` nor `serving`, and no module of it imports
TensorFlow (`ps.convert` does, and only when it is handed a TensorFlow object).
"""
