"""The data plane: how pulls and pushes travel between a worker and a shard.

`frames` says what bytes mean and `handshake` who may send them; `messages` puts pulls and pushes
into frames. `arena` is memory that a worker shares with the shards on its host. `server` and `peer`
are the shard's side. The worker's is `transport`, with one `link` per shard: it makes connections
(`dialing`, `connection`, `tcp`) and repeats on a new one what its `outbox` has kept. `watch`
notices a shard's end. `docs/protocol.md` describes it all for other languages. Nothing here knows
Ray or TensorFlow, and nothing is ever unpickled.
"""
