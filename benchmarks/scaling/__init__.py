"""How a step's time grows with shards, workers, rows and bytes: a cost model, checked here.

`model` is the formulas, `simulate` the same costs with queues; both are pure. `calibrate` measures
the costs one by one, `grid` measures whole steps, `predict` looks at clusters that nobody here has.
"""
