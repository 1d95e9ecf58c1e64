"""The data plane: how pulls and pushes travel between a worker and a shard.

`frames` says what bytes mean and `handshake` who may send them; `messages` puts pulls and pushes
into frames. `arena` is memory that a worker shares with the shards on its host. `server` is the
shard's side, `connection` and `transport` are the worker's. `docs/protocol.md` describes it all for
other languages. Nothing here knows Ray or TensorFlow, and nothing is ever unpickled.
"""
