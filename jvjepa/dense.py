"""The layer that every product with weights goes through: `Dense`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jvjepa.quantization import SmallKernel, is_quantized, product
from jvjepa.typing import Array, DType

PRODUCT = "product"  # what the results of products with weights are called

kernel_init = nn.initializers.truncated_normal(stddev=0.02)


class Dense(nn.Module):
    """x @ kernel + bias; with an adapter, + scale · (x @ a) @ b.

    The kernel may be one that `jvjepa.quantization.quantize` made. The adapter is what the
    collection "lora" holds, see `jvjepa.lora`. With an rng "dropout", and where the adapter has a
    rate, its input is dropped out.

    Args:
        features: output channels.
        dtype: of the computation and the output.
        param_dtype: of kernel [in, features] and bias [features].
    """

    features: int
    dtype: DType = jnp.float32
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., in] to [..., features]."""
        kernel = self._kernel(x.shape[-1])
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x = x.astype(self.dtype)
        y = checkpoint_name(product(x, kernel), PRODUCT)
        y = y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (self.features,))
        return y + self._adapt(x) if self.has_variable("lora", "a") else y

    def _kernel(self, inputs: int) -> Array | SmallKernel:
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
            if is_quantized(kernel):
                return kernel
        return self.param("kernel", kernel_init, (inputs, self.features), self.param_dtype)

    def _adapt(self, x: Array) -> Array:
        a, b, scale = (self.get_variable("lora", name) for name in ("a", "b", "scale"))
        scale = jax.lax.stop_gradient(scale)
        if self.has_variable("lora", "dropout") and self.has_rng("dropout"):
            keep = 1 - self.get_variable("lora", "dropout")
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
            x, scale = jnp.where(kept, x, jnp.zeros((), x.dtype)), scale / keep
        y = jnp.matmul(x, a.astype(self.dtype))
        y = (y.astype(jnp.float32) * scale).astype(self.dtype)  # bfloat16 would round the scale
        return jnp.matmul(y, b.astype(self.dtype))
