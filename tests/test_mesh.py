import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from jvjepa.errors import ConfigError, InputError
from jvjepa.train.mesh import MeshConfig, make_mesh, partition, put, put_batch, shardings


def mesh(data: int = 2, fsdp: int = 2, model: int = 2) -> AbstractMesh:
    return AbstractMesh((data, fsdp, model), ("data", "fsdp", "model"))


@pytest.mark.parametrize(
    ("name", "shape", "axes"),
    [
        ("encoder/blocks/attention/query/kernel", (3, 8, 8), (None, "fsdp", "model")),
        ("encoder/blocks/attention/proj/kernel", (3, 8, 8), (None, "model", "fsdp")),
        ("encoder/blocks/mlp/fc1/kernel", (3, 8, 32), (None, "fsdp", "model")),
        ("encoder/blocks_4/mlp/fc2/kernel", (32, 8), ("model", "fsdp")),
        ("optimizer/1/inner/mu/encoder/blocks/mlp/fc2/kernel", (3, 32, 8), (None, "model", "fsdp")),
        ("trained/encoder/blocks/attention/value/a", (3, 8, 4), (None, None, "fsdp")),
        ("trained/encoder/blocks/attention/value/b", (3, 4, 8), (None, "fsdp", "model")),
        ("trained/encoder/blocks/attention/proj/a", (3, 8, 4), (None, "model", "fsdp")),
        ("encoder/blocks/attention/query/kernel/qvalue", (3, 8, 8), (None, "fsdp", "model")),
        ("encoder/blocks/norm1/scale", (3, 8), (None, "fsdp")),
        ("encoder/patch_embed/kernel", (9, 8), (None, "fsdp")),
        ("encoder/patch_embed/kernel", (8, 9), ("fsdp", None)),
        ("encoder/patch_embed/bias", (8,), (None,)),
        ("encoder/blocks/attention/query/kernel", (3, 9, 9), (None, None, None)),
        ("predictor/proj/kernel", (8, 8), ("model", "fsdp")),
        ("step", (), ()),
    ],
)
def test_rules(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> None:
    assert partition(name, shape, mesh()) == PartitionSpec(*axes)


def test_an_axis_of_one_device_divides_nothing() -> None:
    name, shape = "encoder/blocks/attention/query/kernel", (3, 8, 8)
    assert partition(name, shape, mesh(fsdp=1)) == PartitionSpec(None, None, "model")
    assert partition(name, shape, mesh(model=1)) == PartitionSpec(None, None, "fsdp")
    assert partition(name, shape, mesh(fsdp=1, model=1)) == PartitionSpec(None, None, None)


def test_one_device() -> None:
    here = make_mesh(MeshConfig())
    assert dict(here.shape) == {"data": 1, "fsdp": 1, "model": 1}
    tree = {"norm": {"scale": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    placed = put(tree, shardings(tree, here))
    np.testing.assert_array_equal(placed["norm"]["scale"], tree["norm"]["scale"])
    again = put(placed, shardings(placed, here), copy=True)
    jax.jit(lambda x: x, donate_argnums=0)(again)
    np.testing.assert_array_equal(placed["norm"]["scale"], tree["norm"]["scale"])


def test_numbers_of_devices_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"MeshConfig.fsdp = 0; it must be 1 or more"):
        MeshConfig(fsdp=0)
    with pytest.raises(ConfigError, match=r"data = 3, fsdp = 1, model = 1, but there are 1 dev"):
        make_mesh(MeshConfig(data=3))
    with pytest.raises(InputError, match=r"5 clips .* in 2 parts; it must be a multiple of 2"):
        put_batch({"x": np.zeros((5, 2))}, make_mesh(MeshConfig()), parts=2)


_EIGHT = """
import json, jax, numpy as np
from jvjepa.train.mesh import *
tree = {"query": {"kernel": np.arange(64.0, dtype=np.float32).reshape(1, 8, 8)}}
found = {}
for config in (MeshConfig(), MeshConfig(fsdp=4), MeshConfig(fsdp=2, model=2), MeshConfig(model=8)):
    mesh = make_mesh(config)
    placed = put(tree, shardings(tree, mesh))["query"]["kernel"]
    assert (np.asarray(placed) == tree["query"]["kernel"]).all()
    batch = put_batch({"x": np.arange(16, dtype=np.int32)}, mesh)["x"]
    assert (np.asarray(batch) == np.arange(16)).all()
    found[str(tuple(mesh.shape.values()))] = [
        placed.addressable_shards[0].data.size, batch.addressable_shards[0].data.size
    ]
print(json.dumps(found))
"""


def test_eight_devices_share_what_there_is() -> None:
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", _EIGHT],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(done.stdout) == {
        "(8, 1, 1)": [64, 2],
        "(2, 4, 1)": [16, 2],
        "(2, 2, 2)": [16, 4],
        "(1, 1, 8)": [8, 16],
    }
