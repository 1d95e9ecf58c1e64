"""Run a step against its peers: `make bench-ps`, or `python -m benchmarks.ps`.

A full run takes some 5 minutes and 11 GB. `--only`, `--rows` and `--quick` make it shorter;
`--write` writes `docs/benchmarks-data-plane.md`.
"""

if __name__ == "__main__":  # every process of the benchmark imports this module, and needs no more
    from benchmarks.ps.run import main

    main(__doc__)
