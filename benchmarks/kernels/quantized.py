"""Sums of bags of float16 and int8 rows."""

from __future__ import annotations

from typing import Literal

from benchmarks.kernels import limit, ours
from benchmarks.kernels.cases import BAGS, DRAWS, Size, fill_random, make_batches
from benchmarks.kernels.combine import check_sums
from benchmarks.kernels.lookup_peers import FBGEMM, fbgemm_quantized, quantized_bag
from benchmarks.kernels.machine import huge_percent
from benchmarks.kernels.options import Options
from benchmarks.kernels.report import Cell, Section, lowest, table
from benchmarks.kernels.timing import interleaved
from ps import memory
from ps.ragged import F32

KINDS: tuple[Literal["float16", "int8"], ...] = ("float16", "int8")
_SIZES = (Size(4_000_000, 64), Size(4_000_000, 128))
_QUICK_SIZES = (Size(1_000_000, 64), Size(1_000_000, 128))
_ERROR = {"float16": 2.5e-4, "int8": 3e-3}
"""Of one number of a row: float16 rounds numbers below 0.5 by 1.3e-4, int8 by 1/510 of the range;
FBGEMM's scale and offset are themselves float16."""
_TEXT = """\
Millions of rows read per second, one thread, as above. *FBGEMM* is
`IntNBitTableBatchedEmbeddingBagsCodegen` with int32 ids and float32 output. Both hold the same
rows, each in its own layout (int8 rows: a float32 scale and offset here, float16 there). *limit*
reads the same bytes of the same rows and adds up their bits, in C. At least {huge:.0f}% of the
tables' memory was on huge pages."""


def run(options: Options) -> Section:
    """float16 and int8 at dims 64 and 128."""
    cells = []
    huge = 100.0
    for size in _QUICK_SIZES if options.quick else _SIZES:
        rows: F32 = memory.empty((size.rows, size.dim))
        fill_random(rows)
        for kind in KINDS:
            our_rows = ours.quantize(rows, kind)
            module = fbgemm_quantized(rows, kind)
            for address in (our_rows.records.ctypes.data, module.weights_host.data_ptr()):
                huge = min(huge, huge_percent(address))
            for draw in DRAWS:
                for bag in BAGS:
                    batches = make_batches(size.rows, draw, bag)
                    contenders = [ours.combine(our_rows, batches), quantized_bag(module, batches)]
                    limits = limit.read_bags(our_rows.records, size.dim, batches)
                    check_sums(contenders, rows, batches, _ERROR[kind])
                    cell = Cell(
                        (kind, str(size), draw, str(bag)),
                        batches[0].ids_N.size,
                        interleaved([*contenders, *limits], options.cell_s / 2),
                    )
                    cells.append(options.done("quantised", cell))
    named = [c for c in cells if c.case[2] == "uniform" and c.case[3] in ("20", "100")]
    return Section(
        "Combine, float16 and int8",
        _TEXT.format(huge=huge),
        [table("Quantised rows", ("rows", "table", "ids", "bag"), cells, "M/s")],
        [
            *lowest("float16 and int8, uniform, bags 20 and 100: FBGEMM", 2, named, (FBGEMM,)),
            *lowest("float16 and int8, any cell: FBGEMM", 1, cells, (FBGEMM,)),
        ],
    )
