"""Rules of the reference that no other parity test states, each beside stock TensorFlow."""

from __future__ import annotations

import inspect
import itertools
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import ps.columns as fc
import ps.config as ours
from ps.ragged import F32
from ps.rowstore import RowStore
from serving.tf import EmbeddingForServing, serving_embedding_lookup
from tests.support.exports import ROWS_VD
from tests.support.tf_features import call, feature, ragged, sparse
from workers.batches import Batch
from workers.config import ModelConfig
from workers.dense import DenseStep
from workers.model import ModelInputs

pytestmark = pytest.mark.parity

stock = tf.tpu.experimental.embedding
stock_lookup = stock.serving_embedding_lookup
InvalidArgument = tf.errors.InvalidArgumentError
CLASSES = [(stock.TPUEmbeddingForServing, stock), (EmbeddingForServing, ours)]
BOTH = pytest.mark.parametrize(("kind", "configs"), CLASSES, ids=["TensorFlow", "Manta"])
RAW = {"validate_weights_and_indices": False}


def lookups(config: Any, ids: Any, weights: Any = None) -> Iterator[Callable[[], F32]]:
    """TensorFlow's lookup, then ours in a variable and in an array."""
    given = None if weights is None else [weights]
    for look_up, table in (
        (stock_lookup, tf.Variable(ROWS_VD)),
        (serving_embedding_lookup, tf.Variable(ROWS_VD)),
        (serving_embedding_lookup, ROWS_VD),
    ):
        yield lambda f=look_up, t=table: f([ids], given, {config.table: t}, [config])[0].numpy()


# --- lookups


@pytest.mark.parametrize("options", [{}, RAW], ids=["safe", "raw"])
@pytest.mark.parametrize(
    ("combiner", "wanted"), [("sum", [[10, 14], [10, 12]]), ("mean", [[2.5, 3.5], [5, 6]])]
)
def test_sparse_weights_are_matched_by_position_alone(
    combiner: str, wanted: Any, options: dict[str, Any]
) -> None:
    ids = tf.SparseTensor([[0, 0], [0, 1], [1, 0]], [0, 1, 2], [2, 2])
    weights = tf.SparseTensor([[7, 3], [5, 1], [0, 0]], [1.0, 3.0, 2.0], [9, 9])
    for look_up in lookups(feature(combiner, **options), ids, weights):
        assert look_up().tolist() == wanted


def test_validation_takes_weights_of_another_rank_and_its_absence_does_not() -> None:
    ids = tf.SparseTensor([[0, 0], [0, 1], [1, 0]], [0, 1, 2], [2, 2])
    weights = tf.SparseTensor([[0], [1], [2]], [1.0, 3.0, 2.0], [3])
    for look_up in lookups(feature(), ids, weights):
        assert look_up().tolist() == [[10, 14], [10, 12]]
    for look_up in lookups(feature(**RAW), ids, weights):
        with pytest.raises(ValueError, match="are incompatible"):
            look_up()


def test_a_uniform_inner_dimension_counts_as_rank() -> None:
    cube = tf.RaggedTensor.from_row_lengths(tf.zeros([3, 2], tf.int64), [1, 2])
    for look_up in lookups(feature(), cube):
        with pytest.raises(ValueError, match="Only rank 2 ragged tensor is supported"):
            look_up()
    rows = tf.RaggedTensor.from_uniform_row_length(tf.constant([0, 1, 2, 3], tf.int64), 2)
    for look_up in lookups(feature(), rows):
        assert look_up().tolist() == [[4, 6], [12, 14]]


BAG, WEIGHTED = sparse([[0, 1]]), sparse([[1.0, 1.0]], tf.float32)
IDS = tf.constant([0, 1])


@pytest.mark.parametrize(
    ("ids", "weights", "fragment"),
    [
        (IDS, WEIGHTED, "but input is dense"),
        (BAG, tf.constant([1.0]), "but it does not match type of the"),
        (ragged([[0]]), WEIGHTED, "but it does not match type of the"),
        (IDS.numpy(), WEIGHTED, "but it does not match type of the"),
        (BAG, WEIGHTED, "but this is a sequence feature"),
        (IDS, None, "is a sequence feature but a dense tensor"),
        (3, None, "Tensor, SparseTensor or RaggedTensor expected"),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"output_shape": [1]}], ids=str)
def test_checks_of_weights_come_in_tensorflows_order(
    ids: Any, weights: Any, fragment: str, options: dict[str, Any]
) -> None:
    for look_up in lookups(feature(max_sequence_length=2, **options), ids, weights):
        with pytest.raises(ValueError, match=fragment):
            look_up()


@pytest.mark.parametrize("inputs", [{"a": [0, 1]}, [0, 1], [[0, 1]]], ids=str)
def test_a_list_is_structure_and_no_data(inputs: Any) -> None:
    config = {"a": feature()}
    tables = {config["a"].table: tf.Variable(ROWS_VD)}
    for look_up in (stock_lookup, serving_embedding_lookup):
        with pytest.raises(ValueError, match="Inputs are not a subset of feature_config"):
            look_up(inputs, None, tables, config)


Pair = namedtuple("Pair", ["second", "first"])


def test_dense_sparse_and_ragged_go_together_in_any_containers() -> None:
    """In one call, some with weights; containers and the order of keys are those of the inputs."""
    inputs = OrderedDict(
        z=[BAG, ragged([[0], [1]])],
        a=Pair(IDS, {"y": sparse([[4], [3]]), "x": tf.constant(2)}),
        m=defaultdict(list, {"q": BAG}),
    )
    weights = {
        "z": [WEIGHTED, ragged([[2.0], [3.0]], tf.float32)],
        "a": Pair(None, {"y": None, "x": None}),
        "m": {"q": None},
    }
    features = {
        "z": (feature("mean"), feature()),
        "a": {"second": feature(), "first/x": feature(), "first/y": feature()},
        "m/q": feature(max_sequence_length=3),
        "spare": feature(),
    }
    leaves = tf.nest.flatten(features)
    variables = {f.table: tf.Variable(ROWS_VD) for f in leaves}
    wanted = stock_lookup(inputs, weights, variables, features)
    for tables in (variables, {f.table: ROWS_VD for f in leaves}):
        found = serving_embedding_lookup(inputs, weights, tables, features)
        assert (type(found), list(found)) == (OrderedDict, ["z", "a", "m"])
        assert (type(found["a"]), list(found["a"].first)) == (Pair, ["y", "x"])
        assert (type(found["z"]), type(found["m"])) == (list, type(wanted["m"]))
        tf.nest.assert_same_structure(found, wanted)
        for one, other in zip(tf.nest.flatten(found), tf.nest.flatten(wanted), strict=True):
            np.testing.assert_array_equal(one, other)


FORMS = [lambda values: tf.constant(values[0], tf.int64), sparse, ragged]


@pytest.mark.parametrize("form", FORMS, ids=["dense", "sparse", "ragged"])
@pytest.mark.parametrize("num_rows", [3, 7])
def test_the_rows_bound_the_ids_and_not_the_config_of_five(num_rows: int, form: Any) -> None:
    rows = np.arange(2 * num_rows, dtype=np.float32).reshape(num_rows, 2)
    for table in (tf.Variable(rows), tf.constant(rows), rows):
        found = call(feature(), table, form([[num_rows - 1]]))
        assert found.numpy().tolist() == [rows[-1].tolist()]
        bad = rf"(is not in|out of range) \[0, {num_rows}\)"  # sparse ids in a tensor: the latter
        with pytest.raises(InvalidArgument, match=bad):
            call(feature(), table, form([[num_rows]]))


@pytest.mark.parametrize("form", FORMS, ids=["dense", "sparse", "ragged"])
def test_ids_beyond_int32_find_their_rows_in_arrays(form: Any) -> None:
    table = np.broadcast_to(np.float32(7), (2**31 + 2, 2))
    config = feature()

    def look_up(ids: Any) -> Any:
        return call(config, table, ids)

    for one in (look_up, tf.function(look_up)):
        assert one(form([[2**31 + 1]])).numpy().tolist() == [[7, 7]]
    with pytest.raises(InvalidArgument, match=rf"id {2**31 + 2} is not in \[0, {2**31 + 2}\)"):
        look_up(form([[2**31 + 2]]))


# --- the class


@BOTH
def test_int32_tables_and_quantized_ones_are_served_in_float32_as_they_are(
    kind: Any, configs: Any
) -> None:
    table = configs.TableConfig(
        *(5, 2),
        initializer=lambda shape, dtype: tf.constant(ROWS_VD, dtype),
        combiner="sum",
        name="t",
        quantization_config=configs.QuantizationConfig(2, -1.0, 1.0),
        dtype=tf.int32,
    )
    embedding = kind([configs.FeatureConfig(table)], None)
    embedding.build()
    assert embedding.variables["t"]["parameters"].dtype == tf.float32
    assert embedding([sparse([[0, 1]])])[0].numpy().tolist() == [[4, 6]]
    assert not hasattr(embedding, "embedding_table")


@BOTH
def test_slots_are_where_an_optimizer_is(kind: Any, configs: Any) -> None:
    optimizers = {"a": None, "b": configs.Adagrad(), "c": configs.SGD()}
    tables = [configs.TableConfig(5, 2, optimizer=o, name=n) for n, o in optimizers.items()]
    embedding = kind([configs.FeatureConfig(table) for table in tables], None)
    embedding.build()
    assert {name: set(slots) for name, slots in embedding.variables.items()} == {
        "a": {"parameters"},
        "b": {"parameters", "accumulators"},
        "c": {"parameters"},
    }


def one_table(kind: Any, configs: Any, optimizer: Any = None) -> Any:
    return kind([configs.FeatureConfig(configs.TableConfig(5, 2, name="video"))], optimizer)


@BOTH
@pytest.mark.parametrize(
    ("value", "lazy", "error", "fragment"),
    [
        (tf.zeros([7, 2]), True, ValueError, "shape"),
        (tf.zeros([5, 2], tf.float64), False, InvalidArgument, "expected dtype float"),
        (tf.zeros([5, 2], tf.bfloat16), False, InvalidArgument, "expected dtype float"),
        (tf.zeros([5, 2], tf.float16), True, ValueError, "requested dtype float32"),
    ],
    ids=["shape, lazy", "float64", "bfloat16", "float16, lazy"],
)
def test_a_table_of_another_shape_or_dtype_is_not_restored(
    kind: Any, configs: Any, value: Any, lazy: bool, error: Any, fragment: str, tmp_path: Path
) -> None:
    other = tf.Module()
    other.video = tf.Variable(value, name="video")
    path = tf.train.Checkpoint(embedding=other).save(tmp_path / "x")
    embedding = one_table(kind, configs)

    def restore() -> None:
        if lazy:
            tf.train.Checkpoint(embedding=embedding).restore(path)
            embedding.build()
        else:
            embedding.build()
            tf.train.Checkpoint(embedding=embedding).restore(path)

    with pytest.raises(error, match=fragment):
        restore()


@BOTH
def test_without_the_attribute_saving_a_model_fails(
    kind: Any, configs: Any, tmp_path: Path
) -> None:
    embedding, model = one_table(kind, configs), tf.Module()
    embedding.build()
    spec = tf.TensorSpec([None], tf.int64)
    model.serve = tf.function(lambda ids: embedding.embedding_lookup([ids])[0], [spec])
    with pytest.raises(AssertionError, match="untracked"):
        tf.saved_model.save(model, str(tmp_path / "x"), signatures=model.serve)


def plus_one(shape: Any, dtype: Any = tf.float32) -> Any:
    """Tables of the reference's export example, one larger after training."""
    return tf.cast(tf.reshape(tf.range(2, 2 + shape[0] * shape[1]), shape), dtype)


@BOTH
def test_the_recipe_for_a_saved_model_gives_the_published_numbers_and_names(
    kind: Any, configs: Any, tmp_path: Path
) -> None:
    pair = configs.TableConfig(8, 2, plus_one, combiner="sum", name="pair")
    triple = configs.TableConfig(8, 3, plus_one, combiner="mean", name="triple")
    names = ["feature_one", "feature_two", "feature_three"]
    features = dict(zip(names, map(configs.FeatureConfig, (pair, pair, triple)), strict=True))
    model = tf.Module()
    model.embedding_api = kind(features, None)
    model.embedding_api.build()

    def serve(feats: Any) -> Any:
        found = model.embedding_api.embedding_lookup(feats)
        return 2 * tf.reduce_sum(tf.concat([found[n] for n in names], 1), 1, keepdims=True)

    def spec(form: Any, name: str | None = None) -> Any:
        return {n: form([None], tf.int64, name=name and n) for n in names}

    bags = {n: tf.RaggedTensorSpec([None, None], tf.int64, 1, tf.int64) for n in names}
    signatures = {
        "unnamed": tf.function(serve).get_concrete_function(spec(tf.TensorSpec)),
        "named": tf.function(serve).get_concrete_function(spec(tf.TensorSpec, "by feature")),
        "bags": tf.function(serve).get_concrete_function(bags),
    }
    tf.saved_model.save(model, str(tmp_path / "x"), signatures=signatures)
    loaded = tf.saved_model.load(str(tmp_path / "x")).signatures
    inputs = {
        name: set(loaded[name].structured_input_signature[1]) for name in ("unnamed", "named")
    }
    assert inputs == {"unnamed": {"feats", "feats_1", "feats_2"}, "named": set(names)}
    ids = {"feature_one": [0, 1], "feature_two": [1, 2], "feature_three": [3, 0]}
    dense = {name: tf.constant(values, tf.int64) for name, values in ids.items()}
    assert loaded["named"](**dense)["output_0"].numpy().tolist() == [[100], [62]]
    in_order = dict(
        zip(("feats", "feats_1", "feats_2"), map(dense.get, sorted(names)), strict=True)
    )
    assert loaded["unnamed"](**in_order)["output_0"].numpy().tolist() == [[100], [62]]
    parts = itertools.cycle([tf.constant([0, 1], tf.int64), tf.constant([0, 2], tf.int64)])
    composite = loaded["bags"].structured_input_signature[1]
    assert len(composite) == 6  # values and row_splits of each
    ordered = sorted(composite, key=lambda name: int(name.partition("_")[2] or 0))
    answer = loaded["bags"](**dict(zip(ordered, parts, strict=False)))
    assert answer["output_0"].numpy().tolist() == [[83]]


# --- training


GRADIENTS = [np.array([[0.5, -1.0]], np.float32), np.array([[-0.25, 2.0]], np.float32)]


def after_two_steps(optimizer: Any) -> F32:
    store = RowStore(np.array([[1, -2]], np.float32), optimizer)
    for step, gradient in enumerate(GRADIENTS):
        rate = optimizer.learning_rate
        store.apply(np.array([0]), gradient, rate(step) if callable(rate) else rate)
    return store.rows


def test_a_corrected_rate_makes_adam_that_of_keras() -> None:
    def corrected(step: int) -> float:
        t = step + 1
        return float(0.1 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t))

    adam = ours.Adam(corrected, epsilon=1e-3, sum_inside_sqrt=False)
    variable = tf.Variable([[1.0, -2.0]])
    keras = tf.keras.optimizers.Adam(0.1, epsilon=1e-3)
    for gradient in GRADIENTS:
        keras.apply([tf.constant(gradient)], [variable])
    # Keras rounds its rate to float32 midway, which is one unit in the last place here.
    np.testing.assert_allclose(after_two_steps(adam), variable, rtol=2e-6)


@pytest.mark.parametrize("multiplied", [False, True])
def test_ftrl_is_that_of_tensorflows_kernel(multiplied: bool) -> None:
    var, accumulator, linear = (tf.Variable(tf.fill([1, 2], v)) for v in (0.0, 0.1, 0.0))
    var.assign([[1.0, -2.0]])
    for gradient in GRADIENTS:
        tf.raw_ops.ResourceApplyFtrl(
            var=var.handle,
            accum=accumulator.handle,
            linear=linear.handle,
            grad=gradient,
            lr=0.1,
            l1=0.2,
            l2=0.3 + 0.4 / (2 * 0.1),  # where the kernel has beta
            lr_power=-0.5,
            multiply_linear_by_lr=multiplied,
        )
    options = {"l1_regularization_strength": 0.2, "l2_regularization_strength": 0.3, "beta": 0.4}
    ftrl = ours.FTRL(0.1, **options, multiply_linear_by_learning_rate=multiplied)
    np.testing.assert_allclose(after_two_steps(ftrl), var, rtol=1e-6)


def test_adagrad_is_that_of_tensorflows_kernel() -> None:
    var, accumulator = tf.Variable([[1.0, -2.0]]), tf.Variable(tf.fill([1, 2], 0.1))
    for grad in GRADIENTS:
        tf.raw_ops.ResourceApplyAdagrad(var=var.handle, accum=accumulator.handle, lr=0.1, grad=grad)
    np.testing.assert_allclose(after_two_steps(ours.Adagrad(0.1)), var, rtol=1e-6)


def build_deaf(inputs: ModelInputs) -> tf.Module:
    """A model that does not listen to feature 'b'."""

    class Deaf(tf.Module):
        def __call__(self, activations: Any, dense: Any, training: bool) -> Any:
            return tf.reduce_sum(activations["a"], axis=1)

    return Deaf()


def test_a_feature_that_the_model_ignores_has_a_gradient_of_zeros() -> None:
    inputs = ModelInputs(activations={"a": (2,), "b": (2,)}, num_dense=0, seed=1)
    step = DenseStep(ModelConfig(build=f"{__name__}:build_deaf"), inputs, "mse")
    batch = Batch({}, np.zeros((3, 0), np.float32), np.ones(3, np.float32), np.ones(3, np.float32))
    ones = {name: np.ones((3, 2), np.float32) for name in "ab"}
    grads = step.train(batch, ones, *step.initial()).activation_grads
    assert grads["a"].all()
    assert grads["b"].tolist() == [[0, 0]] * 3


# --- embedding columns

V1 = tf.compat.v1.tpu.experimental
FACTORIES = [
    (V1.embedding_column, fc.embedding_column),
    (V1.shared_embedding_columns, fc.shared_embedding_columns),
]


def identity(name: str = "k", buckets: int = 5) -> Any:
    return fc.categorical_column_with_identity(name, buckets)


def stock_identity(name: str = "k", buckets: int = 5) -> Any:
    return tf.feature_column.categorical_column_with_identity(name, buckets)


def stock_sequence(name: str = "s") -> Any:
    return tf.feature_column.sequence_categorical_column_with_identity(name, 5)


FRAGMENTS = [
    "must be type CategoricalColumn",
    "must be of the same length",
    "Invalid dimension",
    "tensor_core_shape must be size 2",
    "initializer must be callable",
    "same number of buckets",
    "list index out of range",
    "embedding_lookup_device must be in",
    "requires tensor_core_shape",
    "not support sequence columns",
    "must be greater than 0",
    "Non zero max_seq_length",
    "not supported between instances",
]


def refusal(make: Callable[[], Any]) -> Any:
    """None, or the family of the error and which one it is."""
    try:
        make()
    except (TypeError, ValueError, IndexError) as e:
        family = next(c for c in (TypeError, ValueError, IndexError) if isinstance(e, c))
        return family, next(f for f in FRAGMENTS if f in str(e))
    return None


COMMON: dict[str, list[Any]] = {
    "dimension": [2, 0, "2"],
    "tensor_core_shape": [None, [1], [1, 2]],
    "initializer": [None, 3],
    "embedding_lookup_device": [None, "gpu", "tpu_tensor_core"],
}


@pytest.fixture
def _quiet() -> Iterator[None]:
    level = tf.get_logger().level
    tf.get_logger().setLevel("ERROR")  # every function of tf.feature_column is deprecated
    yield
    tf.get_logger().setLevel(level)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize(
    ("make", "values"),
    [
        ("one", {"max_sequence_length": [0, 1, None]}),
        ("many", {"max_sequence_lengths": [None, [0], [0, 1], [1, 0]]}),
    ],
)
def test_whatever_is_wrong_together_the_first_check_of_tensorflow_speaks(
    make: str, values: dict[str, list[Any]]
) -> None:
    one = ["k", stock_identity(), stock_sequence()]
    many = [[], [one[1], "k"], [one[1], stock_identity("b", 4)], [stock_sequence("a"), one[1]]]
    theirs, mine = FACTORIES[make == "many"]
    options = COMMON | values
    seen = set()
    for columns in {"one": one, "many": many}[make]:
        for chosen in itertools.product(*options.values()):
            arguments = dict(zip(options, chosen, strict=True))
            wanted = refusal(lambda c=columns, a=arguments: theirs(c, **a))
            assert refusal(lambda c=columns, a=arguments: mine(c, **a)) == wanted, arguments
            seen.add(wanted)
    assert len(seen) >= 10


def test_the_functions_of_embedding_columns_have_tensorflows_arguments() -> None:
    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    for theirs, mine in FACTORIES:
        assert parameters(mine) == parameters(theirs)
        with pytest.raises(TypeError, match="max_norm"):
            mine(identity(), 2, max_norm=1.0)


def test_row_shards_that_are_not_cut_evenly_are_refused_not_misread() -> None:
    table = stock.TableConfig(7, 2, combiner="sum", name="t")
    config = stock.FeatureConfig(table)
    rows = np.arange(14, dtype=np.float32).reshape(7, 2)
    for cut in ([2], [4, 4]):  # 2 + 5 and 4 + 0 + 3 rows
        shards = [tf.Variable(part) for part in np.split(rows, cut)]
        with pytest.raises(ValueError, match=r"row shards have \[.*\] rows, wanted \["):
            serving_embedding_lookup(tf.constant([6]), None, {table: shards}, config)


def test_there_may_be_more_row_shards_than_rows() -> None:
    table = stock.TableConfig(2, 2, combiner="sum", name="t")
    config = stock.FeatureConfig(table)
    rows = np.float32([[1, 2], [3, 4]])
    shards = [tf.constant(part) for part in (rows[:1], rows[1:], rows[2:])]
    found = serving_embedding_lookup(tf.constant([1, 0]), None, {table: shards}, config)
    assert found.numpy().tolist() == [[3, 4], [1, 2]]
