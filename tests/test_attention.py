import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attentions import MASKS, inputs, mask_of, reference, reference_gradients
from models import relative_error

from jvjepa import attention as backends
from jvjepa.attention import attention, available, check_cudnn, check_platform, resolve
from jvjepa.cli import main
from jvjepa.encoder import banded_causal_mask
from jvjepa.errors import ConfigError, InputError

BACKENDS = ["xla", "chunked"]  # cudnn needs a GPU, and splash a TPU: test_splash.py


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_QUERY_BLOCK", 7)


@pytest.fixture(params=[True, False], ids=["one cpu", "elsewhere"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`chunked` maps over heads and clips on a single CPU alone."""
    monkeypatch.setattr(backends, "is_one_cpu", lambda: request.param)


def _run(backend: str, arrays: list[jax.Array], mask: np.ndarray | None) -> jax.Array:
    call = jax.jit(lambda arrays, mask: attention(*arrays, mask=mask, backend=backend))
    return call(arrays, None if mask is None else jnp.asarray(mask))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (511, 511), (513, 513), (5, 600)])
def test_every_length(backend: str, sizes: tuple[int, int]) -> None:
    arrays = inputs(*sizes)
    assert relative_error(_run(backend, arrays, None), reference(*arrays, None)) <= 1e-6


@pytest.mark.parametrize("name", ["none", "areas"])
def test_the_clip_of_1152_tokens(name: str) -> None:
    arrays, mask = inputs(1152, 1152, width=16), mask_of(name, 1152, 1152)
    assert relative_error(_run("chunked", arrays, mask), reference(*arrays, mask)) <= 1e-6


@pytest.mark.parametrize("queries", [1, 7, 8, 15, 29, 30])
@pytest.mark.usefixtures("small_blocks", "where")
def test_every_length_in_blocks(queries: int) -> None:
    # a mask with rows of its own for each query, and last blocks that do not come out even
    arrays, mask = inputs(queries, 9), mask_of("blind", queries, 9)
    assert relative_error(_run("chunked", arrays, mask), reference(*arrays, mask)) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.usefixtures("small_blocks", "where")
def test_every_mask_with_gradients(backend: str, name: str) -> None:
    arrays, mask = inputs(18, 40), mask_of(name, 18, 40)
    cotangent = np.random.default_rng(2).normal(size=arrays[0].shape).astype(np.float32)

    @jax.jit
    def run(arrays: list[jax.Array], mask: jax.Array | None) -> tuple[jax.Array, list[jax.Array]]:
        call = functools.partial(attention, mask=mask, backend=backend)
        out, pull = jax.vjp(call, *arrays)
        return out, pull(cotangent)

    out, gradients = run(arrays, None if mask is None else jnp.asarray(mask))
    assert relative_error(out, reference(*arrays, mask)) <= 1e-6
    expected = reference_gradients(*arrays, mask, cotangent)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert relative_error(ours, theirs) <= 1e-6
    if name == "blind":  # what sees nothing
        assert (out[0, 9, 1] == 0).all()
        assert (gradients[0][0, 9, 1] == 0).all()
        assert all((x[1, :, 2] == 0).all() for x in (out, *gradients))


@pytest.mark.usefixtures("small_blocks")
def test_auto_is_the_pick() -> None:
    def program(backend: str) -> str:
        call = functools.partial(attention, mask=jnp.ones((1, 1, 1, 40), bool), backend=backend)
        return str(jax.make_jaxpr(call)(*inputs(18, 40)))

    assert program("auto") == program("chunked") != program("xla")


@pytest.mark.parametrize(
    ("queries", "block"),
    [(1, 1), (511, 511), (512, 512), (513, 257), (1152, 384), (2048, 512), (18432, 512)],
)
def test_blocks_are_even(queries: int, block: int) -> None:
    q = jax.ShapeDtypeStruct((1, queries, 2, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 11, 2, 8), jnp.float32)
    program = str(jax.make_jaxpr(lambda q, k: attention(q, k, k, backend="chunked"))(q, k))
    assert f"f32[{block},11]" in program
    padded = -(-queries // 512) * 512
    assert padded == queries or f"[{padded}," not in program


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_do_not_touch_the_result(backend: str) -> None:
    (q, k, v), mask = inputs(6, 9), np.arange(9).reshape(1, 1, 1, 9) < 5
    changed = [q, k.at[:, 5:].set(50.0), v.at[:, 5:].set(-3.0)]
    assert np.array_equal(_run(backend, [q, k, v], mask), _run(backend, changed, mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend: str) -> None:
    q, k, v = inputs(6, 9)
    arrays = [100 * q, 100 * k, v]  # scores of 1e5, whose float32 steps are 8e-3
    assert relative_error(_run(backend, arrays, None), reference(*arrays, None)) <= 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("small_blocks")
def test_bfloat16(backend: str) -> None:
    arrays, mask = inputs(18, 40, dtype="bfloat16"), mask_of("blind", 18, 40)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=arrays[0].shape), "bfloat16")

    @jax.jit
    def run(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        call = functools.partial(attention, mask=jnp.asarray(mask), backend=backend)
        out, pull = jax.vjp(call, *arrays)
        return out, pull(cotangent)

    # the gradient of JAX's function mixes dtypes
    with jax.numpy_dtype_promotion("standard" if backend == "xla" else "strict"):
        out, gradients = run(*arrays)
    assert out.dtype == jnp.bfloat16
    step = 2.0**-8  # the weights and the result are rounded to 8 bits, each by half a step
    assert relative_error(out, reference(*arrays, mask)) <= step
    expected = reference_gradients(*arrays, mask, cotangent)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert relative_error(ours, theirs) <= 2 * step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("small_blocks")
def test_compiles_once(backend: str, compilations: Callable[[], int]) -> None:
    (q, k, v), mask = inputs(18, 40), jnp.asarray(mask_of("padding", 18, 40))
    function = jax.jit(lambda q, k, v, mask: attention(q, k, v, mask=mask, backend=backend))
    others = (q + 1, k - 1, 2 * v, ~mask)
    before = compilations()
    function(q, k, v, mask).block_until_ready()
    between = compilations()
    function(*others).block_until_ready()
    assert between > before
    assert compilations() == between


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("small_blocks")
def test_under_vmap(backend: str) -> None:
    q, k, v = (jnp.stack([x, 2 * x, x - 1]) for x in inputs(18, 40))
    masks = jnp.asarray(np.random.default_rng(3).random((3, 1, 1, 18, 40)) < 0.7)

    def call(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        return attention(q, k, v, mask=mask, backend=backend)

    @jax.jit
    def run() -> tuple[jax.Array, jax.Array]:
        over_queries = jax.vmap(call, in_axes=(0, None, None, None))
        return jax.vmap(call)(q, k, v, masks), over_queries(q, k[0], v[0], masks[0])

    out, shared = run()
    for i in range(3):
        expected = reference(q[i], k[i], v[i], np.asarray(masks[i]))
        assert relative_error(out[i], expected) <= 1e-6
        expected = reference(q[i], k[0], v[0], np.asarray(masks[0]))
        assert relative_error(shared[i], expected) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("small_blocks")
def test_inside_scan_with_gradients(backend: str) -> None:
    q, k, v = inputs(18, 40)
    mask = mask_of("padding", 18, 40)

    def layers(q: jax.Array, shifts: jax.Array) -> jax.Array:
        def layer(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, None]:
            x = x + shift
            return x + attention(x, k, v, mask=jnp.asarray(mask), backend=backend), None

        return jax.lax.scan(layer, q, shifts)[0]

    shifts = jnp.asarray([0.0, 0.5, -0.25])
    seen, x = [], np.asarray(q, np.float64)
    for shift in (0.0, 0.5, -0.25):
        seen.append(x + shift)
        x = seen[-1] + reference(seen[-1], k, v, mask)

    @jax.jit
    def run(q: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, pull = jax.vjp(lambda q: layers(q, shifts), q)
        return out, pull(jnp.ones_like(out))[0]

    out, gradient = run(q)
    assert relative_error(out, x) <= 2e-6
    cotangent = np.ones(q.shape)
    for x in reversed(seen):
        cotangent = cotangent + reference_gradients(x, k, v, mask, cotangent)[0]
    assert relative_error(gradient, cotangent) <= 5e-6


def _temporary_bytes(tokens: int, *, gradient: bool, mask: tuple[int, ...] | None) -> int:
    """What `chunked` needs besides its arguments and results, for two heads of 32."""
    array = jax.ShapeDtypeStruct((1, tokens, 2, 32), jnp.float32)
    seen = None if mask is None else jax.ShapeDtypeStruct(mask, jnp.bool_)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        return jnp.sum(attention(q, k, v, mask=mask, backend="chunked"))

    function = jax.grad(run, argnums=(0, 1, 2)) if gradient else run
    compiled = jax.jit(function).lower(array, array, array, seen).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_memory_grows_linearly(gradient: bool) -> None:
    small, large = 2045, 4093  # in blocks of 512, the last of which overlaps
    masked = {n: _temporary_bytes(n, gradient=gradient, mask=(1, 2, n, n)) for n in (small, large)}
    assert masked[large] <= 2.1 * masked[small]  # with N² it would be 4
    assert masked[large] < large * large * 4  # the scores of one head of the two
    plain = _temporary_bytes(large, gradient=gradient, mask=None)
    assert masked[large] - plain < large * large / 2  # the mask of one head has N² bytes


def test_the_pick_is_written_down() -> None:
    small = (1, 16, 256, 256)
    assert resolve("auto", small) == "chunked"  # these tests run on a CPU
    assert resolve("xla", small) == "xla"
    assert resolve("chunked", small) == "chunked"


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_pick_on_an_accelerator(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert resolve("auto", (1, 16, 4096, 4096)) == "xla"  # 1 GiB of scores
    assert resolve("auto", (1, 16, 4096, 4097)) == "chunked"
    named = {"gpu": "cudnn", "tpu": "splash"}[platform]
    assert resolve(named, (1, 16, 4096, 4096)) == named


def test_backends_of_a_platform() -> None:
    assert available("gpu") == ("auto", "xla", "chunked", "cudnn")
    assert available("tpu") == ("auto", "xla", "chunked", "splash")
    assert available("cpu") == ("auto", "xla", "chunked")
    check_platform("cudnn", "gpu")
    check_platform("splash", "tpu")
    with pytest.raises(ConfigError, match="'cudnn' needs an NVIDIA GPU; on tpu there are auto, x"):
        check_platform("cudnn", "tpu")
    with pytest.raises(ConfigError, match="'splash' needs a TPU; on gpu there are auto, xla"):
        check_platform("splash", "gpu")


def test_a_backend_that_is_not_here_says_so() -> None:
    message = "attention = 'cudnn' needs an NVIDIA GPU; on cpu there are auto, xla, chunked"
    with pytest.raises(ConfigError, match=message):
        attention(*inputs(3, 3, dtype="bfloat16"), backend="cudnn")
    with pytest.raises(ConfigError, match=r"attention = 'flash'; it must be one of .'auto', 'xla'"):
        attention(*inputs(3, 3), backend="flash")


def test_what_cudnn_takes() -> None:
    for width in (8, 64, 80, 128):
        check_cudnn("bfloat16", width)
        check_cudnn(jnp.float16, width)
    with pytest.raises(ConfigError, match="in bfloat16 or float16, and the model in float32"):
        check_cudnn("float32", 64)
    for width in (4, 20, 136):
        with pytest.raises(
            ConfigError, match=f"multiple of 8 .* up to 128, and these have {width}"
        ):
            check_cudnn(jnp.bfloat16, width)


def test_cudnn_checks_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match="and the model in float32"):
        attention(*inputs(3, 3), backend="cudnn")
    with pytest.raises(ConfigError, match="these have 20"):
        attention(*inputs(3, 3, width=20, dtype="float16"), backend="cudnn")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (2, 5, 3, 8)}, r"k \(2, 5, 3, 8\), v \(2, 9, 3, 8\); they must be"),
        ({"q": (1, 6, 3, 8)}, r"q \(1, 6, 3, 8\)"),
        ({"q": (2, 6, 1, 8)}, r"q \(2, 6, 1, 8\)"),
        ({"q": (2, 6, 3, 4)}, r"q \(2, 6, 3, 4\)"),
        ({"q": (6, 3, 8)}, r"q \(6, 3, 8\)"),
        ({"q": (2, 0, 3, 8)}, "nothing to attend to"),
        ({"k": (2, 0, 3, 8), "v": (2, 0, 3, 8)}, "nothing to attend to"),
        ({"mask": (6, 9)}, r"mask is bool \(6, 9\); it must be bool \[2 or 1, 1 or 3, 1 or 6, 9\]"),
        ({"mask": (3, 1, 6, 9)}, r"mask is bool \(3, 1, 6, 9\)"),
        ({"mask": (2, 2, 6, 9)}, r"mask is bool \(2, 2, 6, 9\)"),
        ({"mask": (2, 1, 5, 9)}, r"mask is bool \(2, 1, 5, 9\)"),
        ({"mask": (2, 1, 6, 1)}, r"mask is bool \(2, 1, 6, 1\)"),
    ],
)
def test_shapes_that_do_not_fit(changes: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"q": (2, 6, 3, 8), "k": (2, 9, 3, 8), "v": (2, 9, 3, 8), **changes}
    mask = jnp.ones(shapes.pop("mask"), bool) if "mask" in shapes else None
    with pytest.raises(InputError, match=message):
        attention(*(jnp.zeros(shape) for shape in shapes.values()), mask=mask)


def test_dtypes_that_do_not_fit() -> None:
    q, k, v = inputs(6, 9)
    with pytest.raises(InputError, match="q is float32, k bfloat16, v float32; they must have"):
        attention(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(InputError, match="mask is float32"):
        attention(q, k, v, mask=jnp.ones((1, 1, 1, 9)))


def test_info_names_the_pick(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "vjepa2-vitl-fpc64-256"]) == 0
    expected = "attention: auto takes chunked on cpu for a clip of 8,192 tokens; there is also xla"
    assert expected in capsys.readouterr().out.splitlines()


def test_banded_causal_mask() -> None:
    tubelets = jnp.asarray([[0, 0, 1, 2, 2]])
    expected = [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 1],
    ]
    assert np.array_equal(banded_causal_mask(tubelets, 2)[0, 0], np.asarray(expected, bool))
    with pytest.raises(InputError, match="window = 0"):
        banded_causal_mask(tubelets, 0)
