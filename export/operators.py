"""The ONNX operators that TensorRT takes, and the check that a graph has no others."""

from collections.abc import Iterable

from jvjepa.errors import InputError

# The rows marked Y in `docs/operators.md` of github.com/onnx/onnx-tensorrt at commit 009d6541b4ee
# (TensorRT 8.4), without those for recurrent networks, random numbers and pooling; and
# LayerNormalization, which its changelog adds with 8.6. Later versions only add to the list.
TENSORRT = frozenset(
    """
    Abs Add And ArgMax ArgMin Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos
    DequantizeLinear Div Einsum Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND
    Gemm Greater GreaterOrEqual Identity If IsNaN LayerNormalization Less LessOrEqual Log Loop
    MatMul Max Mean Min Mul Neg Not Or Pad Pow QuantizeLinear Range ReduceL2 ReduceMax ReduceMean
    ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round Scatter
    ScatterElements ScatterND Shape Sigmoid Sign Sin Slice Softmax Split Sqrt Squeeze Sub Sum Tanh
    Tile TopK Transpose Unsqueeze Where Xor
    """.split()
)


def check_operators(nodes: Iterable[tuple[str, str, str]]) -> None:
    """Checks that TensorRT knows every operator of a graph.

    Args:
        nodes: (name, domain, operator) of each node.

    Raises:
        InputError: there are others; it names their nodes.
    """
    unknown = [
        f"{domain + '::' if domain else ''}{operator} (node {name or 'without a name'})"
        for name, domain, operator in nodes
        if domain not in ("", "ai.onnx") or operator not in TENSORRT
    ]
    if unknown:
        raise InputError(
            f"the graph has {len(unknown)} nodes that TensorRT does not take: "
            + ", ".join(unknown[:8])
            + (", .." if len(unknown) > 8 else "")
        )
