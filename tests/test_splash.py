"""Splash attention, interpreted on the CPU, and lowered for a TPU that is not there."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attentions import MASKS, inputs, mask_of, reference, reference_gradients
from models import relative_error, tiny_model

from jvjepa import splash
from jvjepa.attention import attention
from jvjepa.encoder import Encoder
from jvjepa.splash import splash_attention

interpreted = functools.partial(splash_attention, interpret=True)


@pytest.fixture
def tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `attention` does on a TPU, but that its kernels are interpreted."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(splash, "splash_attention", interpreted)


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_with_gradients(name: str) -> None:
    arrays, mask = inputs(18, 140), mask_of(name, 18, 140)
    cotangent = np.random.default_rng(2).normal(size=arrays[0].shape).astype(np.float32)

    @jax.jit
    def run(arrays: list[jax.Array], mask: jax.Array | None) -> tuple[jax.Array, list[jax.Array]]:
        out, pull = jax.vjp(lambda *qkv: interpreted(*qkv, mask), *arrays)
        return out, pull(cotangent)

    out, gradients = run(arrays, None if mask is None else jnp.asarray(mask))
    assert relative_error(out, reference(*arrays, mask)) <= 1e-6
    for ours, theirs in zip(gradients, reference_gradients(*arrays, mask, cotangent), strict=True):
        assert relative_error(ours, theirs) <= 1e-6
    if name == "blind":  # what sees nothing
        assert (out[0, 9, 1] == 0).all()
        assert (gradients[0][0, 9, 1] == 0).all()
        assert all((x[1, :, 2] == 0).all() for x in (out, *gradients))


@pytest.mark.parametrize("sizes", [(1, 1), (128, 128), (129, 640), (5, 300)])
def test_every_length(sizes: tuple[int, int]) -> None:
    arrays = inputs(*sizes)
    out = jax.jit(lambda *qkv: interpreted(*qkv, None))(*arrays)
    assert relative_error(out, reference(*arrays, None)) <= 1e-6


@pytest.mark.parametrize(("length", "block"), [(128, 128), (640, 128), (1152, 384), (18432, 512)])
def test_blocks_divide_the_length(length: int, block: int) -> None:
    sizes = splash._blocks(length, 256)
    assert (sizes.block_q, sizes.block_q_dkv, sizes.block_q_dq) == (block, block, block)
    assert (sizes.block_kv, sizes.block_kv_dkv, sizes.block_kv_dq) == (256, 256, 256)


def test_bfloat16() -> None:
    arrays = inputs(20, 30, width=64, dtype="bfloat16")
    out = jax.jit(lambda *qkv: interpreted(*qkv, None))(*arrays)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out.astype(jnp.float32), reference(*arrays, None)) <= 8e-3


@pytest.mark.usefixtures("tpu")
def test_the_encoder_streams_and_trains_as_with_another_backend() -> None:
    encoder, params = tiny_model()
    video = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 32, 48, 3)), jnp.float32)

    def run(backend: str) -> tuple[jax.Array, dict]:
        part = Encoder(encoder.config, attention=backend)

        def tokens(params: dict) -> jax.Array:
            return part.apply({"params": params}, video, window=2)

        out, pull = jax.vjp(tokens, params)
        return out, *pull(jnp.ones_like(out) / out.size)

    ours, theirs = jax.jit(run, static_argnums=0)("splash"), jax.jit(run, static_argnums=0)("xla")
    errors = jax.tree.map(relative_error, ours, theirs)
    assert max(jax.tree.leaves(errors)) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [64, 88])
@pytest.mark.parametrize("name", ["none", "banded", "padding", "blind"])
def test_it_can_be_lowered_for_a_tpu(dtype: str, width: int, name: str) -> None:
    arrays, mask = inputs(300, 520, width, dtype), mask_of(name, 300, 520)

    def run(arrays: list[jax.Array], mask: jax.Array | None) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda *qkv: splash_attention(*qkv, mask), *arrays)
        return out, *pull(out)

    traced = jax.jit(run).trace(arrays, None if mask is None else jnp.asarray(mask))
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("tpu_custom_call") == 3  # forward, and the gradients of q, and of k and v


DIVIDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jvjepa.attention import attention
from jvjepa.splash import splash_attention
from jvjepa.train.mesh import MeshConfig, make_mesh

mesh = make_mesh(MeshConfig(fsdp=2, model=2))
rng = np.random.default_rng(0)
for heads in (2, 3):  # 3 cannot be divided
    arrays = [jnp.asarray(rng.normal(size=(4, 9, heads, 8)), jnp.float32) for _ in range(3)]
    masks = [None, np.tri(9, dtype=bool)[None, None], rng.random((4, 1, 1, 9)) < 0.6]
    for mask in masks:
        mask = None if mask is None else jnp.asarray(mask)
        right = attention(*arrays, mask=mask, backend="xla")
        spec = NamedSharding(mesh, P(("data", "fsdp"), None, "model" if heads == 2 else None))
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, spec) for x in arrays]
            program = jax.jit(lambda *x: splash_attention(*x, mask, interpret=True))
            out = program(*placed)
            assert "all-gather" not in program.lower(*placed).compile().as_text()
        assert out.sharding.is_equivalent_to(spec, 4), out.sharding
        np.testing.assert_allclose(out, right, atol=3e-6)
"""


def test_every_device_has_its_own_clips_and_heads() -> None:
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", DIVIDED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.usefixtures("tpu")
def test_attention_takes_it() -> None:
    arrays, mask = inputs(7, 9), jnp.asarray(mask_of("banded", 7, 9))
    out = attention(*arrays, mask=mask, backend="splash")
    assert relative_error(out, reference(*arrays, np.asarray(mask))) <= 1e-6
