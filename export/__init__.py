"""Export of jvjepa's models to runtimes without JAX: ONNX, TensorRT, SavedModel, LiteRT, StableHLO.

`jvjepa.export.exporting.export` writes; `jvjepa.export.runtime.EdgeStream` streams what was
written, with numpy and ONNX Runtime (or TensorRT) alone, so nothing is imported here.
"""
