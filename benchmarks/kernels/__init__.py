"""The kernels of `ps.kernels` against TensorFlow, torch, FBGEMM, pandas, NumPy and bare C."""
