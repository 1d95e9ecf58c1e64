"""Sums of bags by TensorFlow, torch and FBGEMM, on the same table in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
    IntNBitTableBatchedEmbeddingBagsCodegen,
)
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from fbgemm_gpu.tbe.utils.quantize import quantize_embs

from benchmarks.kernels.cases import Batch
from benchmarks.kernels.shared import SharedArray
from benchmarks.kernels.timing import Contender
from ps.ragged import F32

SPARSE, RAGGED, TORCH, FBGEMM = "TF sparse", "TF ragged", "torch", "FBGEMM"
_QUANTIZED = {"float16": SparseType.FP16, "int8": SparseType.INT8}
_QUANTIZE_ROWS = 1 << 18


def tensorflow_lookups(table: SharedArray, batches: Sequence[Batch]) -> list[Contender]:
    """Stock `serving_embedding_lookup` in a `tf.function`, on sparse and on ragged ids."""
    embedding = tf.tpu.experimental.embedding
    config = embedding.TableConfig(*table.numpy.shape, combiner="sum", name="table")
    feature = embedding.FeatureConfig(config)

    @tf.function  # type: ignore[untyped-decorator]
    def lookup(ids: Any) -> Any:
        return embedding.serving_embedding_lookup(ids, None, {config: table.variable}, feature)

    def calls(convert: Callable[[Batch], Any]) -> list[Callable[[], object]]:
        return [partial(lookup, convert(b)) for b in batches]

    return [Contender(SPARSE, calls(_sparse)), Contender(RAGGED, calls(_ragged))]


def _sparse(batch: Batch) -> Any:
    bags = np.arange(batch.num_bags)
    places = np.stack([np.repeat(bags, batch.bag), np.tile(np.arange(batch.bag), bags.size)], 1)
    return tf.SparseTensor(places, batch.ids_N, (bags.size, batch.bag))


def _ragged(batch: Batch) -> Any:
    return tf.RaggedTensor.from_row_splits(batch.ids_N, batch.splits_B1, validate=False)


def torch_bag(
    weights_VD: torch.Tensor, batches: Sequence[Batch], num_threads: int = 1
) -> Contender:
    """`torch.nn.functional.embedding_bag` without gradients."""

    lookup = partial(torch.nn.functional.embedding_bag, mode="sum", include_last_offset=True)
    calls = [partial(lookup, ids, weights_VD, splits) for ids, splits in map(_tensors, batches)]
    return Contender(TORCH, calls, before=lambda _: torch.set_num_threads(num_threads))


def fbgemm_bag(
    weights_VD: torch.Tensor, batches: Sequence[Batch], num_threads: int = 1
) -> Contender:
    """FBGEMM's table-batched embedding, float32, forward only, without its check of the ids."""
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(*weights_VD.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_SGD,
        bounds_check_mode=BoundsCheckMode.NONE,
        preallocated_host_buffers={"weights": weights_VD.view(-1)},
    )
    return _forward(module, [_tensors(b) for b in batches], num_threads)


def fbgemm_quantized(rows_VD: F32, kind: str) -> torch.nn.Module:
    """FBGEMM's inference embedding, with the rows as float16 or int8; float32 out."""
    num_rows, dim = rows_VD.shape
    module = IntNBitTableBatchedEmbeddingBagsCodegen(
        [("table", num_rows, dim, _QUANTIZED[kind], EmbeddingLocation.HOST)],
        output_dtype=SparseType.FP32,
        device="cpu",
        bounds_check_mode=BoundsCheckMode.NONE,
    )
    module.initialize_weights()
    ((numbers, scales),) = module.split_embedding_weights()
    for start in range(0, num_rows, _QUANTIZE_ROWS):
        part = slice(start, start + _QUANTIZE_ROWS)
        found, found_scales = quantize_embs(torch.from_numpy(rows_VD[part]), _QUANTIZED[kind])
        numbers[part] = found
        if scales is not None:
            scales[part] = found_scales
    return module


def quantized_bag(module: torch.nn.Module, batches: Sequence[Batch]) -> Contender:
    """The forward pass of `fbgemm_quantized`, with int32 ids as is its default."""
    inputs = [tuple(t.to(torch.int32) for t in _tensors(b)) for b in batches]
    return _forward(module, inputs, num_threads=1)


def _forward(module: torch.nn.Module, inputs: Sequence[Any], num_threads: int) -> Contender:
    forward = torch.no_grad()(module.forward)
    calls = [partial(forward, ids, splits) for ids, splits in inputs]
    return Contender(FBGEMM, calls, before=lambda _: torch.set_num_threads(num_threads))


def _tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(batch.ids_N), torch.from_numpy(batch.splits_B1)
